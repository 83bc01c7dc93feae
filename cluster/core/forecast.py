"""When waiting jobs will start and all will end: the state machine run ahead, with run times that are guessed, many times
over. Pure: it carries out what is decided as if that took no time but the switches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from zlib import crc32

from cluster.core.estimates import OUTLOOK, Outlook
from cluster.core.events import Grant, How, JobGranted, JobParked, JobQueued, JobReleased, Resume, Yield
from cluster.core.job import Job, Placement
from cluster.core.policy import Policy
from cluster.core.slices import Attempt, Holding
from cluster.core.state import ClusterState, Snapshot

ROUNDS = 600
"""Of decisions in one run; what has not happened by then is not foretold."""

IDLE = 50
"""Such rounds in a row, while no end is known of anybody who runs, and it is the same for ever."""

COARSER = 5
"""Runners are reviewed so many times less often than live: it shifts a switch by a little, and saves most of the work."""

_STRIDES = (1, 2, 4, 7, 8, 11, 13, 14)  # each visits every value of an outlook once in OUTLOOK runs


@dataclass
class Run:
    """One future. Unix seconds, by job; of what lies behind its end nothing."""

    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Span:
    """Half of the futures come to it by `p50`, four in five by `p80`; None: too few come to it at all."""

    p50: float | None = None
    p80: float | None = None


@dataclass(frozen=True)
class Guesses:
    """`outlooks`: total run times of the jobs, waiting and running, that are known; another one never ends. `in_time`, asked
    after every round: False breaks a future off, and what lies behind is unknown."""

    outlooks: Mapping[str, Outlook]
    in_time: Callable[[], bool] = lambda: True


def runs(snapshot: Snapshot, policy: Policy, now: float, guesses: Guesses) -> Iterator[Run]:
    """`OUTLOOK` equally likely futures, one at a time, so that a caller in a hurry can stop."""
    coarse = replace(policy, look_s=policy.look_s * COARSER)
    for number in range(OUTLOOK):
        drawn = {
            job_id: outlook[_pick(job_id, number, len(outlook))]
            for job_id, outlook in guesses.outlooks.items()
            if outlook
        }
        yield _Future(snapshot, coarse, now, drawn).run(guesses.in_time)


def span(moments: Sequence[float], of: int) -> Span:
    """Of moments that came in `of` futures or fewer."""
    ordered = sorted(moments)
    at = (max(1, math.ceil(q * of)) - 1 for q in (0.5, 0.8))
    return Span(*(ordered[place] if place < len(ordered) else None for place in at))


def _pick(job_id: str, number: int, values: int) -> int:
    """Jobs are independent of each other, and each goes through all its values; without chance."""
    seed = crc32(job_id.encode())
    return (number * _STRIDES[seed % len(_STRIDES)] + seed // len(_STRIDES)) % values


class _Future:
    def __init__(self, snapshot: Snapshot, policy: Policy, now: float, totals_s: Mapping[str, float]) -> None:
        self._state = ClusterState.rebuilt(snapshot, policy)
        self._policy = policy
        self._now = now
        self._totals_s = totals_s
        self._ends: list[tuple[float, Attempt]] = []
        self._held: dict[Attempt, Holding] = dict(snapshot.held)
        self._told = Run()
        for holding in snapshot.held.values():
            if holding.yielding and not holding.parked:
                self._yield(holding, holding.yielding)
            elif not holding.parked:
                self._await_end(holding, 0.0)

    def run(self, in_time: Callable[[], bool]) -> Run:
        idle = 0
        for _ in range(ROUNDS):
            decisions = self._state.decide(self._now)
            for decision in decisions:
                self._carry_out(decision)
            idle = 0 if decisions or self._ends else idle + 1
            if idle > IDLE or (not decisions and not self._advance()) or not in_time():
                break
        return self._told

    def _carry_out(self, decision: Grant | Resume | Yield) -> None:
        match decision:
            case Grant(job, placement):
                self._begin(job, job.attempt + 1, placement)
            case Resume(job_id, attempt, placement):
                self._begin(self._held[job_id, attempt].job, attempt, placement)
            case Yield(job_id, attempt, how):
                self._yield(self._held[job_id, attempt], how)

    def _begin(self, job: Job, attempt: int, placement: Placement) -> None:
        before = self._held.get((job.id, attempt))
        cost_s = self._policy.park_cost_s if before else self._policy.switch_cost_s if job.attained_s else 0.0
        holding = Holding(job, attempt, placement, self._now)
        self._held[holding.key] = holding
        self._state.apply(JobGranted(job, attempt, placement, self._now))
        self._told.starts.setdefault(job.id, self._now)
        self._await_end(holding, cost_s)

    def _await_end(self, holding: Holding, cost_s: float) -> None:
        total_s = self._totals_s.get(holding.job.id)
        if total_s is not None:
            left_s = max(0.0, total_s - holding.attained_s(self._now))
            heapq.heappush(self._ends, (self._now + left_s + cost_s, holding.key))

    def _yield(self, holding: Holding, how: How) -> None:
        job = replace(
            holding.job, attained_s=holding.attained_s(self._now), attempt=holding.attempt, queued_at=self._now
        )
        self._ends = [end for end in self._ends if end[1] != holding.key]
        heapq.heapify(self._ends)
        if how is How.PARK:
            self._held[holding.key] = replace(holding, job=job, since=self._now, parked=True)
            self._state.apply(JobParked(job.id, holding.attempt, self._now))
            return
        del self._held[holding.key]
        self._state.apply(JobReleased(job.id, holding.attempt))
        self._state.apply(JobQueued(job))

    def _advance(self) -> bool:
        """To the next moment at which anything can change; False: there is none."""
        look = self._state.next_look(self._now)
        following = min(self._ends[0][0] if self._ends else math.inf, math.inf if look is None else look)
        if following == math.inf:
            return False
        self._now = max(self._now, following)
        while self._ends and self._ends[0][0] <= self._now:
            _, key = heapq.heappop(self._ends)
            self._told.ends[key[0]] = self._now
            del self._held[key]
            self._state.apply(JobReleased(*key))
        return True
