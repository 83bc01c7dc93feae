"""`jobs logs`: what a training printed; followed, it goes on from attempt to attempt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from app.cli.client import Client
from app.cli.command import command
from app.cli.commands.watch import TERMINAL
from app.cli.output import clean
from app.cli.session import Session
from app.cli.stream import EventStream

ATTEMPT_HEADER = "x-log-attempt"


@dataclass(frozen=True)
class Options:
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False
    attempt: Annotated[int | None, typer.Option(min=1, help="Default: the last that wrote.")] = None
    rank: Annotated[int, typer.Option(min=0)] = 0
    tail: Annotated[int | None, typer.Option(min=0, help="Only the last lines.")] = None


def register(jobs: typer.Typer) -> None:
    command(jobs, "logs")(logs)


def logs(session: Session, id: Annotated[str, typer.Argument(help="ftjob-…")], options: Options) -> None:
    """What the training printed. With --json an object a line."""
    client = session.client()
    lines = _followed(session, client, id, options) if options.follow else _read(client, id, options)
    for line in lines:
        if session.out.json:
            session.out.item(line)
        else:
            print(clean(line["line"]), flush=options.follow)


def _read(client: Client, id: str, options: Options) -> Iterator[dict[str, Any]]:
    query = {"attempt": options.attempt, "rank": options.rank, "tail": options.tail}
    with client.stream(f"/finetune/{id}/logs", **query) as response:
        attempt = int(response.headers[ATTEMPT_HEADER])
        for line in response.iter_lines():
            yield {"line": line, "attempt": attempt, "rank": options.rank}


def _followed(session: Session, client: Client, id: str, options: Options) -> Iterator[dict[str, Any]]:
    """The attempt is named in every request: an offset means nothing in another attempt's log."""
    path = f"/finetune/{id}"
    attempt, tail = options.attempt or _last_attempt(client, path), options.tail
    while True:
        stream = EventStream(
            client, f"{path}/logs", lost=lambda why: session.out.note(f"connection lost ({why}); coming back")
        )
        for event in stream.read(attempt=attempt, rank=options.rank, tail=tail):
            yield {"line": event["line"], "attempt": attempt, "rank": options.rank}
        job = client.get(path)
        if options.attempt is not None or job["status"] in TERMINAL:
            return
        attempt, tail = max(attempt + 1, job["attempt"]), None
        session.out.note(f"attempt {attempt}")


def _last_attempt(client: Client, path: str) -> int:
    return int(client.call("GET", f"{path}/logs", params={"tail": 0}).headers[ATTEMPT_HEADER])
