"""How a function becomes a command: it gets the session, the global options and the aliases that all commands share.

A dataclass in a command's signature stands for its fields, each an option of its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

from app.cli.contexts import Given
from app.cli.errors import exit_code
from app.cli.session import Session
from cluster.errors import HeliostatError

F = TypeVar("F", bound=Callable[..., None])
SAME = {"list": "ls", "delete": "rm", "remove": "rm", "environment": "env", "environments": "env", "get": "show"}
PANEL = "Everywhere"


class Aliases(typer.core.TyperGroup):
    """Singular and plural, ls and list, rm and delete all work."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = SAME.get(cmd_name, cmd_name)
        candidates = (name, f"{name}s", name.removesuffix("s"))
        return next((self.commands[other] for other in candidates if other in self.commands), None)


@dataclasses.dataclass(frozen=True)
class GlobalOptions:
    """`Given`, as options; they may stand before or after the command."""

    url: Annotated[str | None, typer.Option(help="Where the service is.", rich_help_panel=PANEL)] = None
    token_file: Annotated[str | None, typer.Option(metavar="FILE", help="Holds the token.", rich_help_panel=PANEL)] = (
        None
    )
    context: Annotated[str | None, typer.Option(help="A saved service and token.", rich_help_panel=PANEL)] = None
    tenant: Annotated[str | None, typer.Option(help="Operators: act for this tenant.", rich_help_panel=PANEL)] = None
    json: Annotated[bool, typer.Option("--json", help="JSON; streams: an object a line.", rich_help_panel=PANEL)] = (
        False
    )

    def over(self, earlier: Given | None) -> Given:
        return Given.of(**vars(self)).over(earlier or Given())


def group(help: str) -> typer.Typer:
    app = typer.Typer(help=help, cls=Aliases, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_remember_globals())
    return app


def command(app: typer.Typer, name: str) -> Callable[[F], F]:
    """Registers `function(session, …)`; its docstring is the help. Errors become exit codes here."""

    def register(function: F) -> F:
        app.command(name, help=inspect.getdoc(function))(_expanded(function))
        return function

    return register


def _remember_globals() -> Callable[..., None]:
    def remember(context: typer.Context, /, **values: Any) -> None:
        context.obj = GlobalOptions(**values).over(context.obj)

    return _signed(remember, "globals", _fields(GlobalOptions))


def _expanded(function: Callable[..., None]) -> Callable[..., None]:
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    structures: dict[str, Any] = {
        parameter.name: parameter.annotation for parameter in own if dataclasses.is_dataclass(parameter.annotation)
    }
    shared = {field.name for field in dataclasses.fields(GlobalOptions)}

    def run(context: typer.Context, /, **values: Any) -> None:
        given = GlobalOptions(**{key: values.pop(key) for key in shared}).over(context.obj)
        for name, kind in structures.items():
            keys = [field.name for field in dataclasses.fields(kind)]
            values[name] = kind(**{key: values.pop(key) for key in keys})
        _run(given, functools.partial(function, **values))

    flat = [new for old in own for new in (_fields(old.annotation) if old.name in structures else [old])]
    return _signed(run, function.__name__, [*flat, *_fields(GlobalOptions)])


def _run(given: Given, work: Callable[[Session], None]) -> None:
    with Session(given) as session:
        try:
            work(session)
        except HeliostatError as error:
            session.out.error(error)
            raise typer.Exit(exit_code(error)) from error


def _fields(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=hints[field.name]
        )
        for field in dataclasses.fields(kind)
    ]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default


def _signed(function: Callable[..., None], name: str, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Typer reads the options from a signature: this one is made, not written."""
    first = inspect.Parameter("context_", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]

    def call(*, context_: typer.Context, **values: Any) -> None:
        function(context_, **values)

    signed = cast(Any, call)
    signed.__signature__ = inspect.Signature([first, *keyword_only])
    signed.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *keyword_only)}
    signed.__name__ = name
    signed.__doc__ = None
    return call
