"""Looking on at a job: events as they come, drawn on a terminal, as lines in a pipe, as JSON lines for programs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import typer
from rich.live import Live

from app.cli.client import Client
from app.cli.errors import DETACHED, DONE, JOB_CANCELLED, JOB_FAILED, ServiceError, Unreachable
from app.cli.job_text import event_line, failure, result
from app.cli.progress import Progress
from app.cli.session import Session
from app.cli.stream import EventStream

REOPEN_S = 1.0
"""A stream that was closed properly before the job's end (a service that is restarted) is opened again after so long."""

TERMINAL = {"succeeded": DONE, "failed": JOB_FAILED, "cancelled": JOB_CANCELLED}


def follow(session: Session, job: dict[str, Any]) -> None:
    """Until the job has ended; leaves with its exit code. Ctrl-C leaves the job alone."""
    try:
        job = _look_on(session, job)
    except KeyboardInterrupt:
        session.out.note(f"\ndetached; the job goes on. Come back: heliostat jobs watch {job['id']}")
        raise typer.Exit(DETACHED) from None
    _ending(session, job)
    raise typer.Exit(TERMINAL[job["status"]])


def _look_on(session: Session, job: dict[str, Any]) -> dict[str, Any]:
    client, path = session.client(), f"/finetune/{job['id']}"
    progress = Progress(job)
    stream = EventStream(
        client, f"{path}/events", lost=lambda why: session.out.note(f"connection lost ({why}); coming back")
    )
    with _screen(session, progress) as draw:
        while True:
            for event in stream.read():
                progress.absorb(event)
                draw(event)
            progress.job = _now(client, path, progress.job)
            if progress.job["status"] in TERMINAL:
                return progress.job
            time.sleep(REOPEN_S)


def _now(client: Client, path: str, before: dict[str, Any]) -> dict[str, Any]:
    """The job, or what we knew of it while the service is down: the stream has the patience to wait for it."""
    try:
        now: dict[str, Any] = client.get(path)
    except Unreachable:
        return before
    except ServiceError as error:
        if error.status < 500:
            raise
        return before
    return now


def _screen(session: Session, progress: Progress) -> Any:
    if not session.out.live:
        return nullcontext(session.out.item if session.out.json else _printer(session, progress))
    return _Drawn(session, progress)


def _printer(session: Session, progress: Progress) -> Callable[[dict[str, Any]], None]:
    def draw(event: dict[str, Any]) -> None:
        line = event_line(event, progress)
        if line:
            session.out.say(line)

    return draw


class _Drawn:
    """A picture at the foot of the terminal; what is worth keeping scrolls by above it."""

    def __init__(self, session: Session, progress: Progress) -> None:
        self._progress = progress
        self._live = Live(console=session.out.console, get_renderable=progress.picture, refresh_per_second=4)
        self._say = _printer(session, progress)

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        self._live.start()
        return self._draw

    def __exit__(self, *_error: object) -> None:
        self._live.stop()

    def _draw(self, event: dict[str, Any]) -> None:
        if event.get("type") != "metrics":
            self._say(event)


def _ending(session: Session, job: dict[str, Any]) -> None:
    if session.out.json:
        session.out.item(job)
    elif job["status"] == "succeeded":
        session.out.show(job, lambda: result(job))
    elif job["status"] == "failed":
        session.out.show(job, lambda: failure(session.client(), job))
    else:
        session.out.say(f"{job['id']} was cancelled")
