"""`context`, `whoami`, `version`: where we are and as whom."""

from __future__ import annotations

import platform
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.command import command, group
from app.cli.contexts import DEFAULT_URL, Context, contexts_file, load_contexts, save_contexts
from app.cli.output import pairs, table
from app.cli.session import Session
from cluster.errors import InvalidRequest

contexts = group("Saved services and tokens; one is current.")


def register(app: typer.Typer) -> None:
    app.add_typer(contexts, name="context")
    command(app, "whoami")(whoami)
    command(app, "version")(version)


@command(contexts, "ls")
def ls(session: Session) -> None:
    """All contexts; never their tokens."""
    saved = load_contexts()
    data = [
        {"name": name, "current": name == saved.current, "url": context.url, "tenant": context.tenant}
        for name, context in saved.contexts.items()
    ]
    rows = [("*" if row["current"] else "", row["name"], row["url"], row["tenant"]) for row in data]
    session.out.show(
        {"object": "list", "data": data, "file": str(contexts_file())},
        lambda: table(("", "name", "url", "tenant"), rows),
    )


@command(contexts, "use")
def use(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """Makes a context the current one."""
    saved = load_contexts()
    context = saved.get(name)
    save_contexts(type(saved)(name, saved.contexts))
    session.out.show({"current": name, "url": context.url}, lambda: pairs([("current", name), ("url", context.url)]))


@command(contexts, "set")
def set_(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """Saves --url, --token-file and --tenant under a name."""
    given = session.given
    if given.url is None and given.token_file is None:
        raise InvalidRequest("there is nothing to save", hint="give --url and --token-file")
    if given.token_file is not None and not given.token_file.is_file():
        raise InvalidRequest(f"there is no file {given.token_file}", param="--token-file")
    file = str(Path(given.token_file).absolute()) if given.token_file else None
    save_contexts(load_contexts().with_context(name, Context(given.url or DEFAULT_URL, None, file, given.tenant)))
    session.out.show({"saved": name}, lambda: pairs([("saved", name), ("use it", f"heliostat context use {name}")]))


@command(contexts, "rm")
def rm(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """Forgets a context; its token file stays."""
    saved = load_contexts()
    saved.get(name)
    save_contexts(saved.without(name))
    session.out.show({"removed": name}, lambda: pairs([("removed", name)]))


def whoami(session: Session) -> None:
    """Who the service takes us for."""
    client = session.client()
    me: dict[str, Any] = {**client.get("/me"), "url": client.connection.url, "context": client.connection.context}
    session.out.show(me, lambda: pairs(me.items()))


def version(session: Session) -> None:
    """Versions of this command and its Python."""
    data = {"heliostat": version_of("heliostat"), "python": platform.python_version()}
    session.out.show(data, lambda: pairs(data.items()))
