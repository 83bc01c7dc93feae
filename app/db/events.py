"""Events: appended in the transaction of the change that they tell of, read per job by number or per tenant as a
tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, cast, func, select, tuple_, update
from sqlalchemy.orm import Session

from app.db.ids import EVENT, new_id
from app.db.models import Event, Job
from cluster.errors import InvalidRequest, NotFound


@dataclass(frozen=True)
class NewEvent:
    """`type`: state, stage, metrics, checkpoint, evaluated, log, warning … `level`: info, warn or error."""

    type: str
    message: str
    level: str = "info"
    data: dict[str, Any] = field(default_factory=dict)


def append_event(session: Session, job_id: str, event: NewEvent) -> int:
    """Writes the event under the job's next number, which it holds the job's row for until the transaction ends: so
    numbers commit in order and without gaps. Returns the number. Raises `NotFound`."""
    statement = update(Job).where(Job.id == job_id).values(last_seq=Job.last_seq + 1)
    row = session.execute(
        statement.returning(Job.last_seq, Job.tenant_id, Job.attempt).execution_options(synchronize_session=False)
    ).one_or_none()
    if row is None:
        raise NotFound(f"job {job_id} does not exist", code="job_not_found")
    seq, tenant, attempt = row
    session.add(
        Event(
            job_id=job_id,
            seq=seq,
            id=new_id(EVENT),
            tenant_id=tenant,
            type=event.type,
            level=event.level,
            message=event.message,
            data=event.data,
            attempt=attempt,
        )
    )
    session.flush()
    return int(seq)


def events_of_job(session: Session, job_id: str, after: int = 0, limit: int = 100) -> Sequence[Event]:
    """In order of their numbers; every number above `after` that has been committed is there."""
    statement = select(Event).where(Event.job_id == job_id, Event.seq > after).order_by(Event.seq).limit(limit)
    return session.scalars(statement).all()


@dataclass(frozen=True)
class TailCursor:
    """A place in a tenant's tail. As text (`str`) it is the id of a server-sent event."""

    xid: int = 0
    job_id: str = ""
    seq: int = 0

    def __str__(self) -> str:
        return f"{self.xid}:{self.seq}:{self.job_id}"

    @classmethod
    def parse(cls, text: str) -> TailCursor:
        """Raises `InvalidRequest`."""
        parts = text.split(":", 2)
        if len(parts) != 3 or not (parts[0].isdecimal() and parts[1].isdecimal()) or max(map(len, parts[:2])) > 18:
            raise InvalidRequest(
                f"{text[:80]!r} is not the id of an event of this stream",
                code="invalid_cursor",
                param="Last-Event-ID",
                hint="Send the id of the last event that was received, or none to start at the present.",
            )
        return cls(int(parts[0]), parts[2], int(parts[1]))

    @classmethod
    def of(cls, event: Event) -> TailCursor:
        return cls(event.xid, event.job_id, event.seq)


def tail_end(session: Session) -> TailCursor:
    """The present: events of transactions that end later come after it."""
    xmin = session.scalar(select(_settled_below()))
    return TailCursor(int(xmin or 0) - 1, "\U0010ffff", 0)


def tail_of_tenant(session: Session, tenant: str, after: TailCursor, limit: int = 100) -> Sequence[Event]:
    """The tenant's events after the cursor, in an order in which nothing ever appears before what was already read:
    only those of transactions older than every open one. One held open delays the tail; it neither loses nor
    reorders."""
    place = tuple_(Event.xid, Event.job_id, Event.seq)
    statement = (
        select(Event)
        .where(Event.tenant_id == tenant, Event.xid < _settled_below())
        .where(place > tuple_(after.xid, after.job_id, after.seq))
        .order_by(Event.xid, Event.job_id, Event.seq)
        .limit(limit)
    )
    return session.scalars(statement).all()


def _settled_below() -> ColumnElement[int]:
    """Every transaction with a lower number has ended."""
    xmin = func.pg_snapshot_xmin(func.pg_current_snapshot())
    return cast(cast(xmin, Event.message.type), BigInteger)
