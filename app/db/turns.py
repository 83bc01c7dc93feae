"""What a driver writes into its lease: renewed, and given back while the process lives on. The caller holds the job's row."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from app.db.models import Job, Lease, LeaseSlot
from app.db.scheduler_writes import count_attained
from app.db.transitions import Change, transition
from app.db.usage import turn_closed
from cluster.core.events import How
from cluster.core.job import JobState


def renew_lease(session: Session, job: Job, ttl_s: float) -> tuple[str | None, datetime | None]:
    """The order that stands in it, and since when it is parked."""
    expires_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)
    renewed = update(Lease).where(*_open(job)).values(expires_at=expires_at)
    returning = renewed.returning(Lease.ordered, Lease.parked_at).execution_options(synchronize_session=False)
    rows = session.execute(returning).all()
    return rows[0].ordered, rows[0].parked_at


def park_job(session: Session, job: Job) -> bool:
    """running → parked where that was ordered; its slots are anybody's then."""
    ordered = session.execute(select(Lease.ordered, Lease.order_reason).where(*_open(job))).all()
    if job.state != JobState.RUNNING or any(lease.ordered != How.PARK for lease in ordered):
        return False
    session.execute(delete(LeaseSlot).where(LeaseSlot.job_id == job.id, LeaseSlot.attempt == job.attempt))
    away = {"ordered": None, "ordered_at": None, "order_reason": None, "parked_at": func.clock_timestamp()}
    closed = update(Lease).where(*_open(job)).values(**turn_closed(), **away)
    session.execute(closed.execution_options(synchronize_session=False))
    count_attained(session, [job.id])
    return transition(session, job, Change(JobState.PARKED, ordered[0].order_reason or "gave way to others"))


def order_reason(session: Session, job: Job) -> str | None:
    """Why the scheduler wants the attempt to give way; None: it does not."""
    return session.scalar(select(Lease.order_reason).where(*_open(job), Lease.ordered.is_not(None)).limit(1))


def _open(job: Job) -> tuple[ColumnElement[Any], ...]:
    return Lease.job_id == job.id, Lease.attempt == job.attempt, Lease.released_at.is_(None)
