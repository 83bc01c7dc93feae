"""`jobs`: look at them, steer them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.cli.command import command, group
from app.cli.commands import watch
from app.cli.job_text import JOB_COLUMNS, event_line, failure, job_row, summary
from app.cli.line_text import explanation
from app.cli.output import cell, table
from app.cli.progress import Progress
from app.cli.session import Session
from app.cli.stream import EventStream

app = group("Fine-tuning jobs.")
Id = Annotated[str, typer.Argument(help="ftjob-…")]


@command(app, "ls")
def ls(
    session: Session,
    status: Annotated[str | None, typer.Option(help="Only these.")] = None,
    sort: Annotated[str | None, typer.Option(help="As the API sorts.")] = None,
    limit: Annotated[int, typer.Option(min=1)] = 50,
) -> None:
    """Jobs, newest first."""
    rows = session.client().pages("/finetune", limit, status=status, sort=sort)
    session.out.show(
        {"object": "list", "data": rows}, lambda: table(JOB_COLUMNS, map(job_row, rows), empty="no jobs yet")
    )


@command(app, "show")
def show(session: Session, id: Id) -> None:
    """One job; of a failed one also why, whose turn it is and what to do."""
    client = session.client()
    job = client.get(f"/finetune/{id}")
    session.out.show(job, lambda: failure(client, job) if job["status"] == "failed" else summary(job))


@command(app, "watch")
def watch_(session: Session, id: Id) -> None:
    """Looks on until the end. Exit: 0 succeeded, 1 failed, 5 cancelled, 130 detached with Ctrl-C."""
    watch.follow(session, session.client().get(f"/finetune/{id}"))


@command(app, "events")
def events(
    session: Session,
    id: Id,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
) -> None:
    """What happened to a job, in order."""
    client = session.client()
    path = f"/finetune/{id}/events"
    if not follow:
        page = client.pages(path)
        session.out.show({"object": "list", "data": page}, lambda: "\n".join(map(event_line, page)) or "no events yet")
        return
    progress = Progress(client.get(f"/finetune/{id}"))
    stream = EventStream(client, path, lost=lambda why: session.out.note(f"connection lost ({why}); coming back"))
    for event in stream.read():
        progress.absorb(event)
        if session.out.json:
            session.out.item(event)
        else:
            session.out.say(event_line(event, progress))


@command(app, "explain")
def explain(session: Session, id: Id) -> None:
    """Why a job waits or what it holds, and when it should start and end."""
    told = session.client().get(f"/finetune/{id}/explain")
    session.out.show(told, lambda: explanation(told))


@command(app, "resume")
def resume(
    session: Session,
    id: Id,
    gpu_hours: Annotated[float | None, typer.Option(metavar="H", help="A larger budget, in all.")] = None,
    usd: Annotated[float | None, typer.Option(metavar="N", help="A larger budget, in all.")] = None,
) -> None:
    """Puts a paused job back into the queue; one that has used its budget needs a larger one."""
    budget = {name: value for name, value in (("gpu_hours", gpu_hours), ("usd", usd)) if value is not None}
    body = {"budget": budget} if budget else {}
    _steered(session, session.client().post(f"/finetune/{id}/resume", body))


def _steer(verb: str, help: str) -> None:
    def steer(session: Session, id: Id) -> None:
        _steered(session, session.client().post(f"/finetune/{id}/{verb}"))

    steer.__doc__ = help
    command(app, verb)(steer)


def _steered(session: Session, job: dict[str, Any]) -> None:
    session.out.show(job, lambda: f"{job['id']} is {job['status']}{_reason(job)}")


def _reason(job: dict[str, Any]) -> str:
    reason = (job.get("status_details") or {}).get("reason")
    return f" ({cell(reason)})" if reason else ""


_steer("cancel", "Ends a job; its checkpoints stay.")
_steer("pause", "Saves a checkpoint and frees the slots.")
_steer("retry", "Puts a failed job back into the queue; it goes on from its last checkpoint.")
