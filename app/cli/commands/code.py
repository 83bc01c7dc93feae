"""`code`: what jobs of method `custom` run, from a folder or an archive."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Group, RenderableType

from app.cli.command import command, group
from app.cli.output import pairs, table
from app.cli.packing import pack
from app.cli.session import Session
from app.cli.units import ago, size

app = group(
    "Your own training code, for `finetune --method custom`. Uploading under an existing name makes a new version."
)
Ref = Annotated[str, typer.Argument(help="Id, name or name@version.")]


@command(app, "upload")
def upload(
    session: Session,
    source: Annotated[Path, typer.Argument(metavar="DIR|FILE", exists=True, readable=True)],
    name: Annotated[str | None, typer.Option(help="Default: the name of the folder or file.")] = None,
) -> None:
    """Sends a folder (without .git, .venv, caches) or an archive, .tar.gz or .zip."""
    made = send(session, source, name)
    session.out.show(made, lambda: _shown(made))


def send(session: Session, source: Path, name: str | None = None) -> dict[str, Any]:
    """The version that it became; the one that is there, where nothing has changed."""
    with _archive(source) as (filename, archive):

        def request() -> dict[str, Any]:
            archive.seek(0)
            return {"data": {"name": name} if name else {}, "files": {"file": (filename, archive)}}

        made: dict[str, Any] = session.client().upload("/code", request)
        return made


@contextmanager
def _archive(source: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if not source.is_dir():
        with source.open("rb") as file:
            yield source.name, file
        return
    with tempfile.TemporaryFile() as packed:
        pack(source, packed)
        yield f"{source.resolve().name}.tar.gz", packed


def _shown(code: dict[str, Any]) -> RenderableType:
    files = [(name, sha256[:12]) for name, sha256 in sorted((code.get("files") or {}).items())]
    facts = pairs(
        [
            ("id", code["id"]),
            ("name", code["ref"]),
            ("files", code["file_count"]),
            ("size", size(code["bytes"])),
            ("sha256", code["sha256"]),
            ("added", ago(code["created_at"])),
            ("use it", f"heliostat finetune --code {code['ref']} --entrypoint train.py …"),
        ]
    )
    return Group(facts, table(("file", "sha256"), files)) if files else facts


@command(app, "ls")
def ls(session: Session, limit: Annotated[int, typer.Option(min=1)] = 100) -> None:
    """Uploaded code, newest first."""
    rows = session.client().pages("/code", limit)
    drawn = [(row["id"], row["ref"], row["file_count"], size(row["bytes"]), ago(row["created_at"])) for row in rows]
    columns = ("id", "name", "files", "size", "added")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, drawn, empty="none yet"))


@command(app, "show")
def show(session: Session, ref: Ref) -> None:
    """One version and its files."""
    code = session.client().get(f"/code/{ref}")
    session.out.show(code, lambda: _shown(code))


@command(app, "rm")
def rm(session: Session, ref: Ref) -> None:
    """Removes a version."""
    session.client().delete(f"/code/{ref}")
    session.out.show({"ref": ref, "deleted": True}, lambda: f"{ref} is removed")
