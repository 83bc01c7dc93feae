"""Which checkpoints of a job stay: the last so many, the best one, and those that other jobs begin with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import exists, select
from sqlalchemy.orm import Session

from app.db.models import Checkpoint, Job


def drop_checkpoints(session: Session, job: Job, best_step: Any) -> list[str]:
    """Deletes the rows of those that go; their prefixes. `best_step`: as the child says, which may say anything."""
    keep = job.hyperparams.get("n_checkpoints")
    if keep is None:
        return []
    newest = select(Checkpoint.id).where(Checkpoint.job_id == job.id)
    last = newest.order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc()).limit(keep)
    going = select(Checkpoint).where(
        Checkpoint.job_id == job.id,
        Checkpoint.id.not_in(last),
        Checkpoint.step != (best_step if isinstance(best_step, int) else -1),
        ~exists().where(Job.parent_checkpoint_id == Checkpoint.id),
    )
    # Whoever begins with one holds it until his job is there: that one goes another time, or stays.
    rows = list(session.scalars(going.with_for_update(skip_locked=True)))
    for row in rows:
        session.delete(row)
    return [row.prefix for row in rows]
