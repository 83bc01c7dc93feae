"""`base-model`: the models that requests name as `base_model`. Adding and removing is for operators."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from app.cli.client import Client, given
from app.cli.command import command, group
from app.cli.errors import DETACHED, HostProblem
from app.cli.output import pairs, table
from app.cli.session import Session
from app.cli.units import ago, size, span

app = group("Base models: a Hugging Face folder, a GGUF file or a hub id, under the name that requests use.")
POLL_S = 1.0


@command(app, "add")
def add(
    session: Session,
    name: Annotated[str, typer.Argument(help="What requests will say.")],
    source: Annotated[str, typer.Argument(metavar="PATH_OR_HUB_ID")],
    chat_template: Annotated[str | None, typer.Option(help="A Jinja file, or the template itself.")] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is ready.")] = True,
) -> None:
    """Registers a model; the service copies and checks it."""
    client = session.client(operator=True)
    body = given({"name": name, "source": _place(source), "chat_template": _text(chat_template)})
    model = client.post("/base-models", body)
    if wait:
        model = _wait(session, client, model)
    session.out.show(model, lambda: _drawn(model))


def _place(source: str) -> str:
    """A path is told in full: the service has another working folder. What is no path here may be a hub id."""
    path = Path(source).expanduser()
    if not path.exists():
        if source.startswith(("/", ".", "~")) or source.endswith(".gguf"):
            raise HostProblem(
                f"there is no file or folder {source}", code="no_such_path", hint="a hub id has no leading / or ."
            )
        return source
    return str(path.resolve())


def _text(template: str | None) -> str | None:
    if template is None or "{" in template:
        return template
    file = Path(template).expanduser()
    return file.read_text() if file.is_file() else template


def _wait(session: Session, client: Client, model: dict[str, Any]) -> dict[str, Any]:
    started, name = time.monotonic(), model["name"]
    session.out.note(f"{name}: preparing")
    with Status("", console=session.out.errors) as status:
        try:
            while model["status"] not in ("ready", "failed"):
                if session.out.live:
                    status.update(f"{name}: {model['status']}, {span(time.monotonic() - started)}")
                time.sleep(POLL_S)
                model = client.get(f"/base-models/{name}")
        except KeyboardInterrupt:
            session.out.note(f"detached; the service goes on: heliostat base-model show {name}")
            raise typer.Exit(DETACHED) from None
    if model["status"] == "failed":
        error = model.get("error") or {}
        message = f"{name} could not be prepared: {error.get('message', 'no reason was given')}"
        raise HostProblem(message, code=error.get("code"), hint=error.get("hint"))
    return model


def _drawn(model: dict[str, Any]) -> Any:
    parameters = model.get("parameters")
    return pairs(
        [
            ("name", model["name"]),
            ("status", model["status"]),
            ("parameters", f"{parameters / 1e6:,.1f} M" if parameters else None),
            ("size", size(model["bytes"]) if model.get("bytes") else None),
            ("source", model.get("source")),
            ("error", (model.get("error") or {}).get("message")),
        ]
    )


@command(app, "ls")
def ls(session: Session) -> None:
    """All base models."""
    rows = session.client().pages("/base-models")
    columns = ("name", "status", "parameters", "size", "added")
    session.out.show({"object": "list", "data": rows}, lambda: table(columns, map(_row, rows), empty="none yet"))


def _row(model: dict[str, Any]) -> tuple[Any, ...]:
    parameters = model.get("parameters")
    count = f"{parameters / 1e6:,.1f} M" if parameters else "–"
    return model["name"], model["status"], count, size(model.get("bytes")), ago(model.get("created_at"))


@command(app, "show")
def show(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """One base model."""
    model = session.client().get(f"/base-models/{name}")
    session.out.show(model, lambda: _drawn(model))


@command(app, "rm")
def rm(session: Session, name: Annotated[str, typer.Argument()]) -> None:
    """Removes a base model that no job needs."""
    session.client(operator=True).delete(f"/base-models/{name}")
    session.out.show({"name": name, "deleted": True}, lambda: f"{name} is removed")
