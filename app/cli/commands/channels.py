"""`channel build`: a local conda channel from wheels and an interpreter, for places that no channel reaches. Needs no service."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli.command import command, group
from app.cli.errors import HostProblem
from app.cli.output import pairs
from app.cli.session import Session
from runtime_envs.errors import EnvironmentProblem

app = group("Conda channels of your own.")


@command(app, "build")
def build(
    session: Session,
    folder: Annotated[Path, typer.Argument(help="The channel; packages that are in it stay.")],
    wheels: Annotated[
        list[Path], typer.Option("--wheels", exists=True, help="A wheel or a folder of wheels; can be repeated.")
    ],
    python: Annotated[Path, typer.Option(help="An interpreter with a prefix of its own (pyenv, uv).")] = Path(
        sys.executable
    ),
) -> None:
    """Makes a conda channel of the wheels and the interpreter; again for another Python."""
    from runtime_envs.channels.build import build_channel  # loads pyarrow, which other commands do not need
    from runtime_envs.channels.interpreter import find_interpreter

    files = [file for place in wheels for file in (sorted(place.glob("*.whl")) if place.is_dir() else [place])]
    try:
        interpreter = find_interpreter(python)
        made = build_channel(folder.absolute(), files, interpreter, session.out.note)
    except EnvironmentProblem as problem:
        raise HostProblem(problem.message, code=problem.code, hint=problem.hint) from problem
    url = made.folder.as_uri()
    if made.missing:
        session.out.note(f"these packages need what no wheel brings: {', '.join(made.missing)}")
    if made.skipped:
        session.out.note(f"left out, not for Python {interpreter.minor} on this platform: {', '.join(made.skipped)}")
    data = {
        "object": "channel",
        "url": url,
        "packages": list(made.packages),
        "missing": list(made.missing),
        "skipped": list(made.skipped),
    }
    setting = f'[environments]\nchannels = {{ conda-forge = "{url}" }}'
    session.out.show(data, lambda: pairs([("packages", len(made.packages)), ("in the configuration", setting)]))
