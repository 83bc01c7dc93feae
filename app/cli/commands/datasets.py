"""`dataset`: upload with progress, and what the service made of the rows."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.text import Text

from app.cli.command import command, group
from app.cli.output import cell, clean, pairs, table
from app.cli.session import Session
from app.cli.units import ago, assignments, size

app = group("Datasets: rows to train on. Uploading under an existing name makes a new version.")


@dataclass(frozen=True)
class UploadOptions:
    name: Annotated[str | None, typer.Option(help="Default: the file's name.")] = None
    format: Annotated[str, typer.Option(help="auto, jsonl, json, csv or parquet.")] = "auto"
    map: Annotated[list[str] | None, typer.Option(metavar="FIELD=COLUMN", help="For instance prompt=question.")] = None


class Watched(io.BufferedReader):
    """A file that tells how much of it was read."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path))
        self._advance = advance

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        self._advance(len(chunk))
        return chunk


@command(app, "upload")
def upload(
    session: Session,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    options: UploadOptions,
) -> None:
    """Sends a file; shows its format, the report and three rows with what they train on."""
    client = session.client()
    columns = assignments(options.map or [], "--map")
    mapped = [f"{field}={column}" for field, column in columns.items()]
    fields = {"name": options.name or default_name(file), "format": options.format, "map": mapped}
    with _bar(session) as bar:
        task = bar.add_task(file.name, total=file.stat().st_size)
        with Watched(file, lambda count: bar.advance(task, count)) as source:

            def request() -> dict[str, Any]:
                source.seek(0)
                bar.reset(task)
                return {"data": fields, "files": {"file": (file.name, source)}}

            made = client.upload("/datasets", request)
    made["report"] = client.get(f"/datasets/{made['id']}/report")
    made["preview"] = client.get(f"/datasets/{made['id']}/preview")["rows"]
    session.out.show(made, lambda: Group(_shown(made), _rendered(made["preview"])))


def default_name(file: Path) -> str:
    """The file's name as a reference: small letters, digits, dots, dashes, underscores."""
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in file.stem.lower()
    )
    return kept.strip("._-")[:64] or "dataset"


def _bar(session: Session) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=session.out.errors, transient=True, disable=not session.out.live)


def _shown(dataset: dict[str, Any]) -> RenderableType:
    report = dataset.get("report") or {}
    chars = report.get("chars") or {}
    return Group(
        pairs(
            [
                ("id", dataset["id"]),
                ("name", f"{dataset['name']}@{dataset['version']}"),
                ("format", f"{dataset['format']} → {dataset.get('task')}"),
                ("rows", f"{dataset['rows']:,}"),
                ("size", size(dataset.get("bytes"))),
                ("characters a row", cell({key: chars[key] for key in ("min", "p50", "p95", "max") if key in chars})),
                ("sha256", dataset.get("sha256")),
                ("added", ago(dataset.get("created_at"))),
            ]
        ),
        *(Text(f"warning: {clean(warning)}", "yellow") for warning in dataset.get("warnings", [])),
    )


def _rendered(rows: list[dict[str, Any]]) -> RenderableType:
    """What carries loss stands out: bold green on a terminal, between « and » everywhere."""
    drawn = Text()
    for number, row in enumerate(rows, start=1):
        drawn.append(f"row {row.get('row', number)}\n", "bold")
        for span in row["spans"]:
            text = clean(span["text"]) + ("…" if span.get("truncated") else "")
            drawn.append(f"  {span['role']}: ", "dim")
            drawn.append(f"«{text}»\n" if span["loss"] else f"{text}\n", "bold green" if span["loss"] else "")
    drawn.append("« » is what the model is trained to say", "dim")
    return drawn


@command(app, "ls")
def ls(session: Session, limit: Annotated[int, typer.Option(min=1)] = 100) -> None:
    """Datasets, newest first."""
    rows = session.client().pages("/datasets", limit)
    columns = ("id", "name", "format", "rows", "size", "added")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, map(_row, rows), empty="none yet"))


def _row(dataset: dict[str, Any]) -> tuple[Any, ...]:
    name = f"{dataset['name']}@{dataset['version']}"
    added = ago(dataset.get("created_at"))
    return dataset["id"], name, dataset["format"], dataset["rows"], size(dataset.get("bytes")), added


@command(app, "show")
def show(session: Session, ref: Annotated[str, typer.Argument(help="Id, name or name@version.")]) -> None:
    """One dataset and its validation report."""
    client = session.client()
    dataset = client.get(f"/datasets/{ref}")
    dataset["report"] = client.get(f"/datasets/{dataset['id']}/report")
    session.out.show(dataset, lambda: _shown(dataset))


@command(app, "preview")
def preview(session: Session, ref: Annotated[str, typer.Argument(help="Id, name or name@version.")]) -> None:
    """Three rows with the loss mask."""
    page = session.client().get(f"/datasets/{ref}/preview")
    session.out.show(page, lambda: _rendered(page["rows"]))


@command(app, "rm")
def rm(session: Session, ref: Annotated[str, typer.Argument(help="Id, name or name@version.")]) -> None:
    """Removes a dataset."""
    session.client().delete(f"/datasets/{ref}")
    session.out.show({"ref": ref, "deleted": True}, lambda: f"{ref} is removed")
