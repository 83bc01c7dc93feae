"""Time slices: from when on a runner may be told to give way, and when what it is worth is looked at again. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from cluster.core.events import How
from cluster.core.job import Job, Placement, Shape
from cluster.core.policy import Policy

Attempt = tuple[str, int]


@dataclass(frozen=True)
class Holding:
    """What one attempt of a job holds: slots since `since`; or, parked, only memory since then."""

    job: Job
    attempt: int
    placement: Placement
    since: float
    yielding: How | None = None
    parked: bool = False

    @cached_property
    def key(self) -> Attempt:
        return self.job.id, self.attempt

    @property
    def shape(self) -> Shape:
        """The one of the job's shapes that it was placed with."""
        slots = self.placement.slots
        return next((shape for shape in self.job.shapes if shape.slots == slots), self.job.shape)

    def park_gb(self, node: str) -> float:
        """Of the memory of one of its nodes, while parked."""
        return self.shape.park_gb * len(self.placement.nodes[node]) / self.placement.slots

    def attained_s(self, now: float) -> float:
        """Seconds of service in all its turns."""
        return self.job.attained_s + (0.0 if self.parked else max(0.0, now - self.since))


def settled_at(holding: Holding, policy: Policy) -> float:
    """Nobody takes its slots earlier."""
    return holding.since + policy.min_run_s


def ripens_in(policy: Policy) -> float:
    """So long after it has settled, it gives way also to one of its own class."""
    return max(0.0, policy.quantum_s - policy.min_run_s)


def expires_at(holding: Holding, policy: Policy) -> float:
    """When a parked one is suspended."""
    return holding.since + policy.park_max_s


def same_slots(before: Holding, then: Holding) -> bool:
    """Whether nothing but the turn has changed: when it began, whether it gives way (but not to be parked)."""
    held = before.placement == then.placement and not (before.parked or then.parked)
    was, job = before.job, then.job
    same = (was.tenant, was.priority, was.born, was.shape) == (job.tenant, job.priority, job.born, job.shape)
    return held and same and How.PARK not in (before.yielding, then.yielding)


def owned(runners: Iterable[Holding], guaranteed: int) -> frozenset[Attempt]:
    """Of what a tenant runs, what is within its guarantee: the first that fit, of the highest priority, then the longest
    there; the rest is borrowed."""
    own = set()
    for holding in sorted(runners, key=lambda one: (one.job.priority.rank, one.since, one.key)):
        if holding.placement.slots <= guaranteed:
            guaranteed -= holding.placement.slots
            own.add(holding.key)
    return frozenset(own)
