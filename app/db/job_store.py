"""`trainers.run.ports.DriverStore` over PostgreSQL: what the driver of one attempt reads and writes.

Who writes must own the job: its attempt is the job's and holds an open lease. Else nothing changes and `Fenced` is
raised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import exists, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, load_only

from app.db.assignments import read_assignment, read_upcoming
from app.db.checkpoints import drop_checkpoints
from app.db.events import NewEvent, append_event
from app.db.ids import CHECKPOINT, new_id
from app.db.models import Checkpoint, Job, Lease, Step
from app.db.registry import Result, register_version, version_of_job
from app.db.session import Database
from app.db.transitions import Change, transition
from app.db.turns import order_reason, park_job, renew_lease
from app.db.usage import allowance
from cluster.core.events import How
from cluster.core.job import ACTIVE, JobState, Node, Wish
from cluster.errors import Conflict, Fenced, NotFound
from trainers.run.ports import Allowance, Assignment, Heartbeat, StepRow

PROGRESS = frozenset({"stage", "progress", "ready", "evaluated"})
"""Events that say that a stage was left behind: each stage has the whole limit for itself."""


class SqlJobStore:
    def __init__(self, database: Database) -> None:
        self._database = database

    def assignment(self, job_id: str, attempt: int) -> Assignment:
        """Raises `Fenced`, and `Conflict` when the base model is not there any more."""
        with self._database.platform() as session:
            return read_assignment(session, _owned(session, job_id, attempt))

    def upcoming(self, job_id: str, attempt: int, node: Node) -> Assignment:
        """Raises `Fenced`, and `Conflict` as `assignment`."""
        with self._database.platform() as session:
            job = session.get(Job, job_id)
            if job is None or job.attempt + 1 != attempt or job.state not in (JobState.QUEUED, JobState.SUSPENDED):
                raise Fenced(f"attempt {attempt} of job {job_id} is not the next one")
            return read_upcoming(session, job, node)

    def heartbeat(self, job_id: str, attempt: int, ttl_s: float) -> Heartbeat:
        with self._database.platform() as session:
            # A shared lock: the scheduler cannot take the job away between this look and the renewal.
            job = session.scalar(select(Job).where(Job.id == job_id).with_for_update(read=True))
            if job is None:
                return Heartbeat(wish=Wish.CANCEL, fenced=True)
            if job.attempt != attempt or job.state not in ACTIVE or not _leased(session, job_id, attempt):
                return Heartbeat(wish=Wish(job.wish), fenced=True)
            ordered, parked_at = renew_lease(session, job, ttl_s)
            return Heartbeat(Wish(job.wish), False, How(ordered) if ordered else None, parked_at is not None)

    def park(self, job_id: str, attempt: int) -> bool:
        with self._database.platform() as session:
            job = _owned(session, job_id, attempt)
            return job.state == JobState.PARKED or park_job(session, job)

    def allowance(self, job_id: str, attempt: int) -> Allowance | None:
        with self._database.snapshot() as session:
            few = load_only(Job.tenant_id, Job.attempt, Job.budget, raiseload=True)
            job = session.scalar(select(Job).where(Job.id == job_id, Job.attempt == attempt).options(few))
            return None if job is None else allowance(session, job)

    def move(
        self,
        job_id: str,
        attempt: int,
        then: JobState,
        *,
        reason: str,
        error: dict[str, str | None] | None = None,
    ) -> bool:
        """Asked again after a lost answer: True, and nothing is written twice."""
        with self._database.platform() as session:
            job = _leaseholder(session, job_id, attempt)
            if job.state == then:
                return True
            return _end_as_wished(session, _active(job), Change(then, reason, error))

    def event(
        self,
        job_id: str,
        attempt: int,
        type: str,
        message: str,
        *,
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Also after the job has left its attempt's hands, as long as the lease is open: last words are welcome."""
        with self._database.platform() as session:
            job = _leaseholder(session, job_id, attempt)
            if type in PROGRESS:
                job.progress_at = func.clock_timestamp()
            append_event(session, job_id, NewEvent(type, message, level, data or {}))

    def record_steps(self, job_id: str, attempt: int, steps: Sequence[StepRow]) -> None:
        if not steps:
            return
        with self._database.platform() as session:
            job = _owned(session, job_id, attempt)
            rows = {
                step.step: asdict(step) for step in steps
            }  # an INSERT cannot touch a row twice: the last one counts
            fixed = {"job_id": job_id, "tenant_id": job.tenant_id, "attempt": attempt}
            statement = insert(Step).values([{**fixed, **row} for row in rows.values()])
            # created_at stays: it says when a step was first reached, which is how fruitless attempts are told apart.
            renewed = {name: statement.excluded[name] for name in ("attempt", *_NUMBERS)}
            session.execute(statement.on_conflict_do_update(index_elements=[Step.job_id, Step.step], set_=renewed))
            job.progress_at = func.clock_timestamp()
            last = steps[-1]
            data = {**asdict(last), "steps": list(rows.values())}
            append_event(session, job_id, NewEvent("metrics", f"step {last.step}: loss {last.loss:.4f}", data=data))

    def commit_checkpoint(
        self, job_id: str, attempt: int, step: int, prefix: str, files: dict[str, str], metrics: dict[str, Any]
    ) -> list[str]:
        """Again for the same step: nothing changes."""
        with self._database.platform() as session:
            job = _owned(session, job_id, attempt)
            statement = insert(Checkpoint).values(
                id=new_id(CHECKPOINT),
                job_id=job_id,
                tenant_id=job.tenant_id,
                attempt=attempt,
                step=step,
                prefix=prefix,
                files=files,
                metrics=metrics,
            )
            made = session.scalar(statement.on_conflict_do_nothing().returning(Checkpoint.id))
            if made is None:
                return []
            job.progress_at = func.clock_timestamp()
            data = {"id": made, "step": step, "metrics": metrics}
            append_event(session, job_id, NewEvent("checkpoint", f"checkpoint of step {step} is durable", data=data))
            return drop_checkpoints(session, job, metrics.get("best_step"))

    def finish(
        self,
        job_id: str,
        attempt: int,
        prefix: str,
        files: dict[str, str],
        metrics: dict[str, Any],
        lineage: dict[str, Any],
    ) -> str:
        with self._database.platform() as session:
            job = _locked(session, job_id)
            if job.attempt == attempt and (done := version_of_job(session, job)) is not None:
                return done
            job = _owned(session, job_id, attempt)
            if job.state != JobState.ARCHIVING:
                raise Conflict(f"job {job_id} is {job.state}, only an archiving one can finish", code="invalid_state")
            name = register_version(session, job, Result(prefix, files, metrics, lineage))
            transition(session, job, Change(JobState.SUCCEEDED, f"registered as {name}"))
            return name


_NUMBERS = ("epoch", "loss", "lr", "grad_norm", "tokens", "seconds")


def _end_as_wished(session: Session, job: Job, change: Change) -> bool:
    """A pause takes a while (the child writes a checkpoint), and the tenant may change his mind meanwhile: a cancel
    overtakes it, and one that was taken back is followed by a resume. One with an error (a budget) asks nobody."""
    wish = Wish(job.wish)
    if change.then is JobState.SUSPENDED:
        return _suspend(session, job, change)
    asked_for = wish is Wish.PAUSE or (change.error is not None and wish is not Wish.CANCEL)
    if change.then is not JobState.PAUSED or asked_for:
        return transition(session, job, change)
    if wish is Wish.CANCEL:
        return transition(session, job, Change(JobState.CANCELLED, "cancel was asked for"))
    return transition(session, job, change) and transition(
        session, job, Change(JobState.QUEUED, "the pause was taken back")
    )


def _suspend(session: Session, job: Job, change: Change) -> bool:
    """A wish that came while it gave way is granted now: it has left its slots anyway."""
    if job.wish == Wish.CANCEL:
        return transition(session, job, Change(JobState.CANCELLED, "cancel was asked for"))
    if job.wish == Wish.PAUSE:
        return transition(session, job, Change(JobState.PAUSED, "pause was asked for"))
    return transition(session, job, replace(change, reason=order_reason(session, job) or change.reason))


def _locked(session: Session, job_id: str) -> Job:
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound(f"job {job_id} does not exist", code="job_not_found")
    return job


def _leased(session: Session, job_id: str, attempt: int) -> bool:
    mine = (Lease.job_id == job_id, Lease.attempt == attempt, Lease.released_at.is_(None))
    return bool(session.scalar(select(exists().where(*mine))))


def _leaseholder(session: Session, job_id: str, attempt: int) -> Job:
    """The job, locked. Raises `Fenced` unless this attempt is the job's and its lease is open."""
    job = _locked(session, job_id)
    if job.attempt != attempt or not _leased(session, job_id, attempt):
        raise Fenced(f"attempt {attempt} of job {job_id} is over: attempt {job.attempt} counts, state {job.state}")
    return job


def _active(job: Job) -> Job:
    if job.state not in ACTIVE:
        raise Fenced(f"attempt {job.attempt} of job {job.id} no longer holds it: its state is {job.state}")
    return job


def _owned(session: Session, job_id: str, attempt: int) -> Job:
    return _active(_leaseholder(session, job_id, attempt))
