"""What ends an attempt though its training is well: its longest run time, its budget, its tenant's quota. The caller stops the
child with a checkpoint."""

from __future__ import annotations

from cluster.core.job import JobState
from cluster.errors import JobFailure, QuotaExceeded, Unavailable
from trainers.run.parts import Outcome
from trainers.run.ports import Allowance, Assignment, DriverStore

ASK_EVERY_S = 10.0
"""Other jobs use the tenant's quota meanwhile, so the rows are asked again; between two answers it counts on by itself."""


class Limits:
    """Of one attempt. Goes by the seconds that the job has run, so it stands still while the job is parked."""

    def __init__(self, store: DriverStore) -> None:
        self._store = store
        self._allowance: Allowance | None = None
        self._asked_at: float | None = None

    def reached(self, assignment: Assignment, ran_s: float) -> Outcome | None:
        """`ran_s`: over all attempts. None: it may go on."""
        if assignment.max_runtime_s is not None and ran_s >= assignment.max_runtime_s:
            return max_runtime_outcome()
        if self._asked_at is None or ran_s - self._asked_at >= ASK_EVERY_S:
            self._ask(assignment, ran_s)
        allowance = self._allowance
        if allowance is None or self._asked_at is None or ran_s - self._asked_at < allowance.left_s:
            return None
        return _used_up(allowance)

    def _ask(self, assignment: Assignment, ran_s: float) -> None:
        try:
            self._allowance = self._store.allowance(assignment.job_id, assignment.attempt)
        except Unavailable:  # without the database the last answer counts
            return
        self._asked_at = ran_s


def max_runtime_outcome() -> Outcome:
    failure = JobFailure(
        "the job reached its max_runtime_hours before it was done; its last checkpoint is kept",
        code="max_runtime_reached",
        param="resource_config.max_runtime_hours",
        hint="Start a job with a longer max_runtime_hours, fewer epochs or max_steps.",
    )
    return Outcome(JobState.FAILED, failure.message, failure.as_dict())


def _used_up(allowance: Allowance) -> Outcome:
    """Paused, not failed: with more allowance it goes on from its checkpoint."""
    if allowance.code == "quota_exceeded":
        told = QuotaExceeded(
            f"the tenant has used its {allowance.limit}; the job is paused at a checkpoint",
            hint="Resume it next month, or ask an operator for a larger quota and resume it then.",
        )
        return Outcome(JobState.PAUSED, f"quota_exceeded: {allowance.limit} are used", told.as_dict())
    failure = JobFailure(
        f"the job has used its budget of {allowance.limit}; it is paused at a checkpoint",
        code=allowance.code,
        param="budget",
        hint='Resume it with a larger one: POST …/resume {"budget": {…}}, or `heliostat jobs resume ID --gpu-hours N`.',
    )
    return Outcome(JobState.PAUSED, f"{allowance.code}: {allowance.limit} are spent", failure.as_dict())
