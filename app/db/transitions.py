"""The one place that changes a job's state: the row, its clocks and the event, together. The caller holds the row's
lock.

Also what a tenant may ask for: at once where nobody holds the job, else as a wish that its driver reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.events import NewEvent, append_event
from app.db.models import Job, Step
from app.db.shapes import settled
from app.db.usage import seconds, settle_start, spent_by
from cluster.core.job import TERMINAL, JobState, Wish, may_follow
from cluster.errors import Conflict

NOBODY_HOLDS = frozenset(
    {JobState.VALIDATING, JobState.QUEUED, JobState.PROVISIONING, JobState.SUSPENDED, JobState.PAUSED}
)
_TAKEN = frozenset({JobState.SUSPENDED, JobState.RECOVERING})
"""Its slots were taken from it: coming back is not billed."""
LEVELS = {JobState.FAILED: "error", JobState.RECOVERING: "warn"}


@dataclass(frozen=True)
class Change:
    then: JobState
    reason: str
    error: dict[str, str | None] | None = None


def transition(session: Session, job: Job, change: Change) -> bool:
    """False, and nothing done, when the state may not follow."""
    was = JobState(job.state)
    if not may_follow(was, change.then):
        return False
    settle_start(session, job, was)
    _set_clocks(job, was, change.then)
    job.state = change.then
    job.reason = change.reason
    if change.then in (JobState.PAUSED, *TERMINAL):
        job.wish = Wish.RUN  # granted, or overtaken
    if change.then is JobState.RUNNING:
        job.shape = settled(job.shape, job.granted)
    if change.then in _TAKEN:
        job.moved = True
    if change.then in (JobState.PAUSED, *TERMINAL):
        job.moved = False
        job.error = dict(change.error) if change.error is not None else None
    if change.then in TERMINAL:
        session.flush()
        job.actual = _actual(session, job)
    data: dict[str, Any] = {"from": was, "to": change.then, "reason": change.reason}
    if change.error is not None:
        data["error"] = change.error
    message = (change.error or {}).get("message") or f"{change.then}: {change.reason}"
    append_event(session, job.id, NewEvent("state", message, LEVELS.get(change.then, "info"), data))
    return True


def _set_clocks(job: Job, was: JobState, then: JobState) -> None:
    now = func.clock_timestamp()  # not now(): the transaction may have begun before the last change
    if was is JobState.RUNNING:
        job.ran_s = Job.ran_s + func.greatest(seconds(now - Job.state_since), 0.0)
    if then is JobState.RUNNING and job.started_at is None:
        job.started_at = now
    if then is JobState.QUEUED and was is not JobState.RECOVERING:
        job.queued_at = now  # a job that recovers keeps its place
    if then in TERMINAL:
        job.finished_at = now
    job.state_since = now
    job.progress_at = now


def _actual(session: Session, job: Job) -> dict[str, Any]:
    steps, tokens, train_s = session.execute(
        select(func.count(), func.coalesce(func.sum(Step.tokens), 0), func.coalesce(func.sum(Step.seconds), 0.0)).where(
            Step.job_id == job.id
        )
    ).one()
    spent = spent_by(session, job.id)
    return {
        "steps": steps,
        "tokens": int(tokens),
        "train_seconds": round(train_s, 3),
        "gpu_hours": round(spent.gpu_hours, 6),
        "usd": round(spent.usd, 4),
    }


def ask(session: Session, job: Job, wish: Wish) -> None:
    """Cancel or pause, as the tenant asks. Asking again changes nothing. Raises `Conflict`."""
    then = JobState.CANCELLED if wish is Wish.CANCEL else JobState.PAUSED
    state = JobState(job.state)
    if state is then or (state not in NOBODY_HOLDS and job.wish == wish):
        return
    if state in NOBODY_HOLDS:
        if not transition(session, job, Change(then, f"{wish} was asked for")):
            raise _refusal(job, wish)
        return
    if state in TERMINAL or state is JobState.ARCHIVING or job.wish == Wish.CANCEL:
        raise _refusal(job, wish)
    job.wish = wish
    append_event(session, job.id, NewEvent("wish", f"{wish} was asked for", data={"wish": wish}))


def resume(session: Session, job: Job) -> None:
    """A paused job goes back to the queue; a pause that has not happened yet is taken back. Raises `Conflict`."""
    if job.state == JobState.PAUSED:
        job.wish = Wish.RUN
        job.error = None
        transition(session, job, Change(JobState.QUEUED, "resumed"))
    elif job.wish == Wish.PAUSE and job.state not in TERMINAL:
        job.wish = Wish.RUN
        append_event(session, job.id, NewEvent("wish", "the pause was taken back", data={"wish": Wish.RUN}))
    else:
        raise _refusal(job, "resume")


def retry(session: Session, job: Job) -> None:
    """A failed job goes back to the queue and goes on from its last checkpoint. Raises `Conflict`."""
    if job.state != JobState.FAILED:
        raise _refusal(job, "retry")
    transition(session, job, Change(JobState.QUEUED, "retried"))
    job.fruitless_attempts = 0
    job.finished_at = job.error = job.actual = None


def _refusal(job: Job, what: str) -> Conflict:
    coming = f" and {job.wish} was asked for" if job.wish != Wish.RUN else ""
    return Conflict(
        f"job {job.id} is {job.state}{coming}: it cannot {what} now",
        code="invalid_state",
        hint={
            "resume": "Only a paused job can be resumed.",
            "retry": "Only a failed job can be retried; send a new request for another run.",
        }.get(what, "Look at its state: a job that has ended, or is storing its result, goes its way."),
    )
