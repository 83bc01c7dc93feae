"""`models`: tuned models and their versions; downloads are checked against their sha256."""

from __future__ import annotations

import hashlib
import tarfile
import tempfile
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from app.cli.command import command, group
from app.cli.errors import Corrupt, HostProblem
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago

app = group("Tuned models, their versions and names.")
Ref = Annotated[str, typer.Argument(help="Name, name@version or name@alias.")]
SHA256_HEADER = "x-content-sha256"


@command(app, "ls")
def ls(session: Session, limit: Annotated[int, typer.Option(min=1)] = 100) -> None:
    """Tuned models, newest first."""
    rows = session.client().pages("/models", limit)
    drawn = [(row["name"], row.get("latest_version"), row.get("aliases"), ago(row.get("created_at"))) for row in rows]
    columns = ("name", "version", "aliases", "created")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, drawn, empty="none yet"))


@command(app, "show")
def show(session: Session, ref: Ref) -> None:
    """A model, its versions and where each came from."""
    client = session.client()
    model = client.get(f"/models/{ref}")
    versions = client.pages(f"/models/{model['name']}/versions")
    session.out.show({**model, "versions": versions}, lambda: _drawn(model, versions))


def _drawn(model: dict[str, Any], versions: list[dict[str, Any]]) -> RenderableType:
    simple = {key: value for key, value in model.items() if key not in ("object", "files", "versions", "created_at")}
    rows = [
        (row["version"], row.get("kind"), row.get("job_id"), row.get("metrics"), ago(row.get("created_at")))
        for row in versions
    ]
    columns = ("version", "kind", "job", "metrics", "created")
    return Group(pairs((key.replace("_", " "), value) for key, value in simple.items()), table(columns, rows))


@command(app, "promote")
def promote(
    session: Session,
    ref: Annotated[str, typer.Argument(help="name@version")],
    alias: Annotated[str, typer.Option(help="The name to move there.")] = "prod",
) -> None:
    """Lets an alias name this version: name@prod."""
    name, _, version = ref.partition("@")
    body = {"version": int(version) if version.isdigit() else version or None}
    moved = session.client().put(f"/models/{name}/aliases/{alias}", body)
    session.out.show(moved, lambda: f"{name}@{alias} is now version {moved.get('version', version)}")


@command(app, "rollback")
def rollback(
    session: Session,
    name: Annotated[str, typer.Argument()],
    alias: Annotated[str, typer.Option(help="The name to move back.")] = "prod",
) -> None:
    """Lets an alias name the version before."""
    moved = session.client().post(f"/models/{name}/rollback", {"alias": alias})
    session.out.show(moved, lambda: f"{name}@{alias} is now version {moved.get('version')}")


@command(app, "rm")
def rm(session: Session, ref: Ref) -> None:
    """Removes a model, or one version of it."""
    session.client().delete(f"/models/{ref}")
    session.out.show({"ref": ref, "deleted": True}, lambda: f"{ref} is removed")


@command(app, "download")
def download(
    session: Session,
    ref: Ref,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder (or file with --tar).")] = None,
    tar: Annotated[bool, typer.Option("--tar", help="Keep the archive as it is.")] = False,
    output: Annotated[str | None, typer.Option(help="Another form of it: merged or gguf.")] = None,
) -> None:
    """Fetches the files, checks their sha256, unpacks them."""
    target = out or Path(ref.replace("/", "_").replace("@", "-") + (".tar" if tar else ""))
    if target.exists() and (tar or not target.is_dir() or any(target.iterdir())):
        raise HostProblem(f"{target} is there already", code="target_exists", hint="name another place with --out")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".heliostat-") as aside:
        archive = Path(aside) / "model.tar"
        digest = _fetch(session, ref, output, archive)
        if tar:
            archive.rename(target)
        else:
            _unpack(archive, Path(aside) / "files", target)
    done = {"ref": ref, "path": str(target), "sha256": digest}
    session.out.show(done, lambda: pairs([("saved", target), ("sha256", digest)]))


def _fetch(session: Session, ref: str, output: str | None, archive: Path) -> str:
    """The archive's sha256, which is the one that the service told."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    digest = hashlib.sha256()
    with Progress(*columns, console=session.out.errors, transient=True, disable=not session.out.live) as bar:
        body = session.client().stream(f"/models/{ref}/download", output=output)
        with body as response, archive.open("wb") as sink:
            task = bar.add_task(ref, total=int(response.headers.get("content-length", 0)) or None)
            for chunk in response.iter_bytes(1 << 20):
                sink.write(chunk)
                digest.update(chunk)
                bar.advance(task, len(chunk))
            told = _told(response)
    if digest.hexdigest() != told:
        raise Corrupt(f"what arrived has the sha256 {digest.hexdigest()}, the service told {told}", hint="try again")
    return told


def _told(response: httpx.Response) -> str:
    if SHA256_HEADER not in response.headers:
        raise Corrupt(f"the service told no {SHA256_HEADER}, so the download cannot be checked")
    return str(response.headers[SHA256_HEADER])


def _unpack(archive: Path, aside: Path, target: Path) -> None:
    """A folder that the archive has around everything is left away."""
    with tarfile.open(archive) as tar:
        tar.extractall(aside, filter="data")
    entries = list(aside.iterdir())
    source = entries[0] if len(entries) == 1 and entries[0].is_dir() else aside
    if target.is_dir():
        target.rmdir()
    source.rename(target)
