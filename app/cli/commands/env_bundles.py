"""`env export` and `env import`: environments as files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from app.cli.command import command
from app.cli.errors import HostProblem
from app.cli.output import pairs
from app.cli.session import Session

EXPORT_TIMEOUT_S = 1800.0
"""Until the first byte: the service fetches the packages before."""
Out = Annotated[Path | None, typer.Option("-o", "--out", dir_okay=False, help="Default: NAME.tar.gz here.")]
Whole = Annotated[bool, typer.Option("--self-contained", help="With the packages of the base, too.")]


def register(app: typer.Typer) -> None:
    command(app, "export")(export)
    command(app, "import")(import_)


def export(
    session: Session,
    ref: Annotated[str, typer.Argument(metavar="NAME", help="Name, name@version or id.")],
    out: Out = None,
    whole: Whole = False,
) -> None:
    """Writes an environment into a signed file that another Heliostat can import, and stock conda can read."""
    target = out or Path(f"{ref.replace('@', '-')}.tar.gz")
    if target.exists():
        raise HostProblem(f"{target} is there already", code="target_exists", hint="name another file with -o")
    session.out.note("collecting the packages …")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".heliostat-") as aside:
        _download(session, f"/environments/{ref}/bundle", Path(aside) / "bundle", whole)
        (Path(aside) / "bundle").rename(target)
    done = {"ref": ref, "path": str(target), "bytes": target.stat().st_size}
    session.out.show(done, lambda: pairs([("saved", target), ("bytes", done["bytes"])]))


def _download(session: Session, path: str, target: Path, whole: bool) -> None:
    download = session.client().download(path, EXPORT_TIMEOUT_S, self_contained=whole)
    with download as response, _bar(session) as bar:
        task = bar.add_task(target.name, total=int(response.headers.get("content-length", 0)) or None)
        with target.open("wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.advance(task, len(chunk))


def import_(
    session: Session, file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)]
) -> None:
    """Makes an environment from a bundle. Its signature must be of this Heliostat, or of one that an operator trusts."""
    with file.open("rb") as source:

        def request() -> dict[str, Any]:
            source.seek(0)
            return {"files": {"file": (file.name, source)}}

        made = session.client().upload("/environments/import", request)
    rows = [("name", made["ref"]), ("fingerprint", made["fingerprint"]), ("signed by", made["signed_by"])]
    session.out.show(made, lambda: pairs(rows))


def _bar(session: Session) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=session.out.errors, transient=True, disable=not session.out.live)
