"""How long the jobs of this service will run: from their own steps, from their work and the speed that was measured for the
same model, or from what their tenant's earlier jobs took. Learns from rows; says on what an estimate rests."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Job, Step
from cluster.core.estimates import Estimator, Outlook, Traits, spread
from cluster.core.job import JobState

LEARNT_FROM = 2_000
"""Ended jobs that are read at first."""

OVERLAP_S = 60.0
"""Ends are read again for so long: transactions commit in another order than their clocks say."""

RECENT = 20
"""Runs of one model, way of training and gang, of whose speed the median counts."""

STEPS = "its own steps"
WORK = "its work and the speed measured for this model"
HISTORY = "what earlier jobs of the tenant took"

Kind = tuple[str, str, int]
"""Base model, training type, slots."""


@dataclass(frozen=True)
class Pace:
    """A job's last step, and the mean seconds of a step."""

    step: int
    mean_s: float


@dataclass(frozen=True)
class Expected:
    """`based_on` empty: only other tenants' jobs speak for it, which is good for a guess of the line, not for its tenant."""

    outlook: Outlook
    based_on: str = ""


@dataclass(frozen=True)
class Measured:
    """One run: seconds of training for each estimated token, and all that went by beside training."""

    s_per_token: float
    beside_s: float


_COLUMNS = (
    Job.id,
    Job.tenant_id,
    Job.training_type,
    Job.shape["slots"].as_integer().label("slots"),
    Job.estimate,
    Job.hyperparams,
    Job.ran_s,
    Job.attained_s,
    Job.max_runtime_s,
    Job.actual,
    func.coalesce(BaseModel.sha256, "").label("model"),
    func.extract("epoch", Job.finished_at).label("finished_at"),
)
_JOBS = select(*_COLUMNS).join(BaseModel, BaseModel.id == Job.base_model_id)


class RunTimes:
    """For one thread at a time. `refresh`, then `expected`."""

    def __init__(self) -> None:
        self._estimator = Estimator()
        self._measured: dict[Kind, deque[Measured]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._tenants: set[str] = set()
        self._learnt: dict[str, float] = {}
        self._last = 0.0

    def refresh(self, session: Session) -> None:
        """Learns from the jobs that have succeeded since: others say nothing of how long such a job takes."""
        at = func.extract("epoch", Job.finished_at)
        asked = _JOBS.where(Job.state == JobState.SUCCEEDED, at > self._last - OVERLAP_S)
        for row in reversed(session.execute(asked.order_by(Job.finished_at.desc()).limit(LEARNT_FROM)).all()):
            if self._learnt.get(row.id) != row.finished_at:
                self._learn(row)
        self._last = max(self._last, *self._learnt.values(), 0.0)
        self._learnt = {job: at for job, at in self._learnt.items() if at > self._last - OVERLAP_S}

    def _learn(self, row: Row[Any]) -> None:
        self._learnt[row.id] = float(row.finished_at)
        run_s = max(row.attained_s, row.ran_s, 1.0)
        self._estimator.learn(self._traits(row), run_s, row.id)
        self._tenants.add(row.tenant_id)
        train_s, tokens = (row.actual or {}).get("train_seconds", 0.0), estimated_tokens(row.estimate, row.hyperparams)
        if train_s > 0 and tokens > 0:
            self._measured[_kind(row)].append(Measured(train_s / tokens, max(0.0, run_s - train_s)))

    def _traits(self, row: Row[Any]) -> Traits:
        return Traits(row.tenant_id, row.slots, row.model, self._work_s(row))

    def _work_s(self, row: Row[Any]) -> float | None:
        """Seconds that its rows should take; None: no such run was measured."""
        measured, tokens = self._measured.get(_kind(row)), estimated_tokens(row.estimate, row.hyperparams)
        if not measured or tokens <= 0:
            return None
        return tokens * median(one.s_per_token for one in measured) + median(one.beside_s for one in measured)

    def expected(
        self, session: Session, attained: Mapping[str, float], paces: Mapping[str, Pace]
    ) -> dict[str, Expected]:
        """Of unfinished jobs, that have been served for so long so far."""
        rows = session.execute(_JOBS.where(Job.id.in_(attained))).all()
        return {row.id: self._expected(row, attained[row.id], paces.get(row.id)) for row in rows}

    def _expected(self, row: Row[Any], attained_s: float, pace: Pace | None) -> Expected:
        steps = row.estimate.get("steps")
        if pace is not None and steps:
            left_s = max(0, steps - pace.step) * pace.mean_s
            return _within(row, attained_s, Expected(spread(attained_s, left_s), STEPS))
        traits = self._traits(row)
        outlook = self._estimator.outlook(traits, attained_s, row.id)
        based_on = WORK if traits.expected_s is not None else HISTORY if row.tenant_id in self._tenants else ""
        return _within(row, attained_s, Expected(outlook, based_on))


def _within(row: Row[Any], attained_s: float, expected: Expected) -> Expected:
    """No job runs longer than its own limit."""
    if row.max_runtime_s is None:
        return expected
    most = attained_s + max(0.0, row.max_runtime_s - row.ran_s)
    return Expected(tuple(min(total_s, most) for total_s in expected.outlook), expected.based_on)


def _kind(row: Row[Any]) -> Kind:
    return row.model, row.training_type, row.slots


def read_paces(session: Session, job_ids: Iterable[str]) -> dict[str, Pace]:
    """In a session of their tenant: steps are its own."""
    asked = select(Step.job_id, func.max(Step.step), func.avg(Step.seconds)).where(Step.job_id.in_(list(job_ids)))
    return {job_id: Pace(step, float(mean_s)) for job_id, step, mean_s in session.execute(asked.group_by(Step.job_id))}


def estimated_tokens(estimate: Mapping[str, Any], hyperparams: Mapping[str, Any]) -> float:
    """Rows × epochs × tokens a row, less what `max_steps` leaves out."""
    tokens, rows, steps = (estimate.get(name) or 0 for name in ("tokens", "rows", "steps"))
    whole = hyperparams.get("epochs", 1) * math.ceil(rows / max(1, hyperparams.get("batch_size", 1)))
    return float(tokens) * (min(1.0, steps / whole) if whole else 1.0)
