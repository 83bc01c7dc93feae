"""When unfinished jobs will start and end: the line run ahead with the run times that are expected, for all jobs at once."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from app.db.session import Database
from app.services.run_times import Expected, Pace, RunTimes, read_paces
from cluster.core.estimates import quantile
from cluster.core.forecast import Guesses, Run, Span, runs, span
from cluster.core.policy import Policy
from cluster.core.state import Snapshot

BUDGET_S = 0.5
"""Of running ahead, each time; the more jobs, the fewer futures, and the nearer their ends."""

FEWEST = 5
"""Futures: below that there is no P80."""

AHEAD = 200
"""So many waiting jobs, the first in line, are run ahead; the others have no estimate yet."""

PACED = 50
"""Tenants whose jobs are foretold from their own steps, those that run first; a transaction each."""

UNKNOWN = Span()


@dataclass(frozen=True)
class Estimate:
    """Unix seconds. `start`: of a job that waits, when it gets slots (again). `based_on`: what its run time is known by."""

    start: Span = UNKNOWN
    finish: Span = UNKNOWN
    based_on: str = ""


NOTHING = Estimate()


@dataclass(frozen=True)
class Forecast:
    at: float = 0.0
    jobs: Mapping[str, Estimate] = field(default_factory=dict)

    def of(self, job_id: str) -> Estimate:
        return self.jobs.get(job_id, NOTHING)


class Forecasts:
    """For one thread at a time."""

    def __init__(self, database: Database, policy: Policy, clock: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._policy = policy
        self._clock = clock
        self._run_times = RunTimes()

    def of(self, snapshot: Snapshot, now: float) -> Forecast:
        """Raises `Unavailable`."""
        snapshot = replace(snapshot, waiting=snapshot.waiting[:AHEAD])
        paces = self._paces(snapshot)
        with self._database.snapshot() as session:
            self._run_times.refresh(session)
            expected = self._run_times.expected(session, _attained(snapshot, now), paces)
        foretold = self._run_ahead(snapshot, now, expected) if _anybody_waits(snapshot) else []
        return Forecast(now, _estimates(snapshot, now, expected, foretold))

    def _paces(self, snapshot: Snapshot) -> dict[str, Pace]:
        """Of jobs that have begun. Each tenant's steps are read as that tenant."""
        begun: dict[str, list[str]] = defaultdict(list)
        for job in (*(one.job for one in snapshot.held.values()), *snapshot.waiting):
            if job.attempt > 0:
                begun[job.tenant].append(job.id)
        paces: dict[str, Pace] = {}
        for tenant, job_ids in list(begun.items())[:PACED]:
            with self._database.tenant(tenant) as session:
                paces |= read_paces(session, job_ids)
        return paces

    def _run_ahead(self, snapshot: Snapshot, now: float, expected: Mapping[str, Expected]) -> list[Run]:
        found: list[Run] = []
        until = self._clock() + BUDGET_S
        guesses = Guesses({job_id: one.outlook for job_id, one in expected.items()}, lambda: self._clock() < due)
        due = self._clock() + BUDGET_S / FEWEST
        for run in runs(snapshot, self._policy, now, guesses):
            found.append(run)
            due = self._clock() + BUDGET_S / FEWEST
            if len(found) >= FEWEST and self._clock() > until:
                break
        return found


def _attained(snapshot: Snapshot, now: float) -> dict[str, float]:
    waiting = {job.id: job.attained_s for job in snapshot.waiting}
    return waiting | {holding.job.id: holding.attained_s(now) for holding in snapshot.held.values()}


def _anybody_waits(snapshot: Snapshot) -> bool:
    return bool(snapshot.waiting) or any(holding.parked or holding.yielding for holding in snapshot.held.values())


def _estimates(
    snapshot: Snapshot, now: float, expected: Mapping[str, Expected], foretold: list[Run]
) -> dict[str, Estimate]:
    if not foretold:
        running = {one.job.id: one.attained_s(now) for one in snapshot.held.values()}
        return {job_id: _alone(expected[job_id], now, ran_s) for job_id, ran_s in running.items() if job_id in expected}
    starts, ends = _moments(foretold)
    return {
        job_id: Estimate(
            start=span(starts[job_id], of=len(foretold)),
            finish=span(ends[job_id], of=len(foretold)) if one.based_on else Span(),
            based_on=one.based_on,
        )
        for job_id, one in expected.items()
    }


def _alone(expected: Expected, now: float, ran_s: float) -> Estimate:
    """Nobody waits, so nothing will come between."""
    if not expected.based_on:
        return NOTHING
    left = (quantile(expected.outlook, q, ran_s) for q in (0.5, 0.8))
    return Estimate(finish=Span(*(None if one is None else now + one for one in left)), based_on=expected.based_on)


def _moments(foretold: list[Run]) -> tuple[Mapping[str, list[float]], Mapping[str, list[float]]]:
    starts: dict[str, list[float]] = defaultdict(list)
    ends: dict[str, list[float]] = defaultdict(list)
    for run in foretold:
        for into, moments in ((starts, run.starts), (ends, run.ends)):
            for job_id, at in moments.items():
                into[job_id].append(at)
    return starts, ends
