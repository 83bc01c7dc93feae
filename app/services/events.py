"""Events, metrics, checkpoints and logs of a job: pages, and streams that miss nothing and end when the job has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio.to_thread
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.events import TailCursor, events_of_job, tail_end, tail_of_tenant
from app.db.models import Checkpoint, Event, Step
from app.db.repository import Page, PageRequest, Repository
from app.services.access import Caller
from app.services.job_view import STATUS, unix
from app.services.logs import Log, attempts, open_log
from app.services.parts import Parts
from cluster.core.job import TERMINAL, JobState
from cluster.errors import InvalidRequest, Unavailable

T = TypeVar("T")
BATCH = 200
LOOK_EVERY_S = 1.0
"""Followers are woken by notifications; this is for a lost one, and for a tail held up by an open transaction."""


@dataclass(frozen=True)
class Message:
    """One server-sent event."""

    id: str
    event: str
    data: dict[str, Any]


@dataclass(frozen=True)
class LogPlace:
    """`attempt` None: the last one that wrote. `tail`: only so many last lines."""

    job_id: str
    attempt: int | None = None
    rank: int = 0
    offset: int = 0
    tail: int | None = None


@dataclass(frozen=True)
class _Batch:
    messages: list[Message]
    ended: bool


class EventService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def page(self, caller: Caller, job_id: str, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """In order of their numbers. `after`: an event's id or number."""
        tenant = caller.may("log:read", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id)
            rows = events_of_job(session, job.id, _number(session, job_id, after), limit + 1)
        return [event_view(row) for row in rows[:limit]], len(rows) > limit

    async def follow(self, caller: Caller, job_id: str, last_id: str | None) -> AsyncIterator[Message]:
        """Every event after `last_id`, until the job has ended and all was told. Refuses before it begins."""
        tenant, last = caller.may("log:read", job_id), sequence(last_id)
        await anyio.to_thread.run_sync(self._look, tenant, job_id, last)
        return self._follow(tenant, job_id, last)

    async def _follow(self, tenant: str, job_id: str, last: int) -> AsyncIterator[Message]:
        with self._parts.changes.follow() as follower:
            while True:
                batch = await _patiently(self._look, tenant, job_id, last)
                for message in batch.messages:
                    yield message
                    last = int(message.id)
                if batch.ended:
                    return
                if len(batch.messages) < BATCH:
                    await follower.wait(LOOK_EVERY_S)

    def _look(self, tenant: str, job_id: str, last: int) -> _Batch:
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id)  # first: what is read afterwards holds its last event
            rows = events_of_job(session, job_id, last, BATCH)
            told = rows[-1].seq if rows else last
            messages = [Message(str(row.seq), row.type, event_view(row)) for row in rows]
            return _Batch(messages, job.state in TERMINAL and told >= job.last_seq)

    async def follow_tenant(self, caller: Caller, last_id: str | None) -> AsyncIterator[Message]:
        """Everything of the tenant from now on, or after `last_id`; endless. Refuses before it begins."""
        tenant = caller.may("log:read")
        place = TailCursor.parse(last_id) if last_id else await anyio.to_thread.run_sync(self._present, tenant)
        return self._follow_tenant(tenant, place)

    async def _follow_tenant(self, tenant: str, place: TailCursor) -> AsyncIterator[Message]:
        with self._parts.changes.follow() as follower:
            while True:
                rows = await _patiently(self._tail, tenant, place)
                for row in rows:
                    place = TailCursor.of(row)
                    yield Message(str(place), row.type, event_view(row))
                if len(rows) < BATCH:
                    await follower.wait(LOOK_EVERY_S)

    def _present(self, tenant: str) -> TailCursor:
        with self._parts.database.tenant(tenant) as session:
            return tail_end(session)

    def _tail(self, tenant: str, place: TailCursor) -> Sequence[Event]:
        with self._parts.database.tenant(tenant) as session:
            return tail_of_tenant(session, tenant, place, BATCH)

    def metrics(self, caller: Caller, job_id: str, points: int) -> dict[str, Any]:
        """At most `points` steps, evenly spread, the first and the last among them; and all evaluations."""
        tenant = caller.may("log:read", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id)
            total = session.scalars(select(func.count()).where(Step.job_id == job.id)).one()
            steps = _spread(session, job.id, total, points)
            evaluated = select(Event).where(Event.job_id == job.id, Event.type == "evaluated").order_by(Event.seq)
            evaluations = [event.data for event in session.scalars(evaluated)]
        return {
            "object": "fine_tuning.metrics",
            "job_id": job.id,
            "total_steps": total,
            "data": [_step_view(step) for step in steps],
            "evaluations": evaluations,
        }

    def checkpoints(self, caller: Caller, job_id: str, request: PageRequest) -> Page[Checkpoint]:
        tenant = caller.may("model:read", job_id)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            job = repository.job(job_id)
            return repository.page(Checkpoint, request, Checkpoint.job_id == job.id)

    def log(self, caller: Caller, place: LogPlace) -> tuple[Log, int, int]:
        """(log, attempt, where to begin)."""
        tenant = caller.may("log:read", place.job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(place.job_id)
        wrote = attempts(self._parts.storage, tenant, job.id)
        attempt = place.attempt or (wrote[-1] if wrote else max(job.attempt, 1))
        log = open_log(self._parts.storage, (tenant, job.id), attempt, place.rank)
        return log, attempt, log.tail_offset(place.tail) if place.tail is not None else place.offset

    async def follow_log(self, caller: Caller, place: LogPlace) -> AsyncIterator[Message]:
        """Lines from the place on; the id of each is the offset behind it. Ends with its attempt."""
        _, attempt, offset = await anyio.to_thread.run_sync(self.log, caller, place)
        return self._follow_log(caller, LogPlace(place.job_id, attempt, place.rank, offset))

    async def _follow_log(self, caller: Caller, place: LogPlace) -> AsyncIterator[Message]:
        offset, held, last_round = place.offset, b"", False
        while True:
            new, over = await _patiently(self._written, caller, place, offset + len(held))
            *lines, held = (held + new).split(b"\n")
            if last_round and held:
                lines, held = [*lines, held], b""
            for line in lines:
                offset += len(line) + 1
                yield Message(str(offset), "log", {"line": line.decode(errors="replace"), "offset": offset})
            if last_round:
                return
            last_round = over  # the last segment may be stored a moment after the end: look once more
            await anyio.sleep(LOOK_EVERY_S)

    def _written(self, caller: Caller, place: LogPlace, offset: int) -> tuple[bytes, bool]:
        """What is there from `offset` on, and whether the attempt is over."""
        over = self._attempt_over(caller, place.job_id, place.attempt or 0)
        log, _, _ = self.log(caller, place)
        return b"".join(log.read(offset)), over

    def _attempt_over(self, caller: Caller, job_id: str, attempt: int) -> bool:
        with self._parts.database.tenant(caller.tenant) as session:
            job = Repository(session, caller.tenant).job(job_id)
            return job.state in TERMINAL or job.attempt > attempt


async def _patiently(look: Callable[..., T], *given: Any) -> T:
    """While the database is down a stream stays open: its heartbeat goes on, and what was missed comes later."""
    while True:
        try:
            return await anyio.to_thread.run_sync(look, *given)
        except Unavailable:
            await anyio.sleep(LOOK_EVERY_S)


def sequence(last_id: str | None) -> int:
    """Raises `InvalidRequest`."""
    if last_id is None or last_id == "":
        return 0
    if not last_id.isascii() or not last_id.isdecimal() or len(last_id) > 18:
        raise InvalidRequest(
            f"{last_id[:80]!r} is not the number of an event",
            code="invalid_cursor",
            param="Last-Event-ID",
            hint="Send the id of the last event that was received, or none to begin at the first.",
        )
    return int(last_id)


def _number(session: Session, job_id: str, after: str | None) -> int:
    if after is None or not after.startswith("ftevent-"):
        return sequence(after)
    found = session.scalar(select(Event.seq).where(Event.id == after, Event.job_id == job_id))
    if found is None:
        raise InvalidRequest(f"after={after[:80]!r} is not an event of this job", code="invalid_cursor", param="after")
    return int(found)


def event_view(row: Event) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "job_id": row.job_id,
        "seq": row.seq,
        "type": row.type,
        "level": row.level,
        "message": row.message,
        "data": _data(row),
        "attempt": row.attempt,
        "created_at": unix(row.created_at),
    }


def _data(row: Event) -> dict[str, Any]:
    """A change of state is also told in the words of the API."""
    to = row.data.get("to")
    return {**row.data, "status": STATUS[JobState(to)]} if row.type == "state" and to else row.data


def checkpoint_view(row: Checkpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "job_id": row.job_id,
        "step": row.step,
        "attempt": row.attempt,
        "files": row.files,
        "metrics": row.metrics,
        "created_at": unix(row.created_at),
    }


def _spread(session: Session, job_id: str, total: int, points: int) -> Sequence[Step]:
    number = func.row_number().over(order_by=Step.step)
    numbered = select(Step.step, number.label("n")).where(Step.job_id == job_id).subquery()
    wanted = {1 + place * (total - 1) // (points - 1) for place in range(min(points, total))}
    kept = numbered.c.n.in_(wanted | {total})
    statement = select(Step).join(numbered, Step.step == numbered.c.step).where(Step.job_id == job_id, kept)
    return session.scalars(statement.order_by(Step.step)).all()


def _step_view(step: Step) -> dict[str, Any]:
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "seconds", "attempt")
    return {key: getattr(step, key) for key in keys} | {"created_at": unix(step.created_at)}
