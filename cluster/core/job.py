"""A job's states, the one table of what may follow what, and what the scheduler knows of a job. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property


class JobState(StrEnum):
    VALIDATING = "validating"
    QUEUED = "queued"
    PROVISIONING = "provisioning"
    PREPARING = "preparing"
    RUNNING = "running"
    PARKED = "parked"
    SUSPENDED = "suspended"
    RECOVERING = "recovering"
    ARCHIVING = "archiving"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


S = JobState
TERMINAL = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})
ACTIVE = frozenset({S.PREPARING, S.RUNNING, S.PARKED, S.ARCHIVING})
"""States in which a driver holds the job and a lease its slots."""

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    S.VALIDATING: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.QUEUED: frozenset({S.PROVISIONING, S.PREPARING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.PROVISIONING: frozenset({S.QUEUED, S.PREPARING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.PREPARING: frozenset({S.RUNNING, S.RECOVERING, S.PAUSED, S.SUSPENDED, S.FAILED, S.CANCELLED}),
    S.RUNNING: frozenset({S.PARKED, S.SUSPENDED, S.RECOVERING, S.ARCHIVING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.PARKED: frozenset({S.RUNNING, S.SUSPENDED, S.RECOVERING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.SUSPENDED: frozenset({S.QUEUED, S.PREPARING, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.RECOVERING: frozenset({S.QUEUED, S.PAUSED, S.FAILED, S.CANCELLED}),
    S.ARCHIVING: frozenset({S.SUCCEEDED, S.RECOVERING, S.FAILED}),
    S.PAUSED: frozenset({S.QUEUED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset({S.QUEUED}),  # retry
    S.CANCELLED: frozenset(),
}


def may_follow(now: JobState, then: JobState) -> bool:
    return then in TRANSITIONS[now]


class Wish(StrEnum):
    """What the tenant wants of a job that is running; the driver reads it with every heartbeat."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class Priority(StrEnum):
    URGENT = "urgent"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def rank(self) -> int:
        """0 goes first."""
        return list(Priority).index(self)


@dataclass(frozen=True)
class Shape:
    """What one job needs of a cluster, worked out at validation: `slots` accelerators of one of `kinds` (empty: any),
    each with at least `memory_gb` GiB."""

    slots: int
    memory_gb: float
    kinds: tuple[str, ...] = ()
    nodes: int = 1
    """The most nodes that the gang may span. It takes as few as can be: whole nodes and at most one part of a node."""
    park_gb: float = 0.0
    """GiB of host memory that all of it needs while parked, on each of its nodes in proportion to its slots there; 0: it cannot be
    parked."""


@dataclass(frozen=True)
class Job:
    """A job as the scheduler sees it. Times in Unix seconds."""

    id: str
    tenant: str
    shape: Shape
    queued_at: float
    """Since when it waits (again)."""
    priority: Priority = Priority.NORMAL
    attempt: int = 0
    not_before: float = 0.0
    alternatives: tuple[Shape, ...] = ()
    """Other shapes that would do, in order of preference, after `shape`."""
    submitted_at: float | None = None
    """None: it has waited once only, since `queued_at`."""
    attained_s: float = 0.0
    """Seconds that it held its slots in turns that have ended."""
    environment: str = ""
    """Fingerprint; a node that has it needs not prepare it."""
    model: str = ""
    """Base model; a node that has it needs not copy it."""
    region: str = ""
    """Only nodes of this region; empty: any."""
    market: str = ""
    """`spot` or `on_demand`: only nodes of this market; empty: any."""
    yields: bool = True
    """Whether it may be told to give way; False: it holds its slots to its end, unless its node goes."""

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        return (self.shape, *self.alternatives)

    @property
    def born(self) -> float:
        return self.queued_at if self.submitted_at is None else self.submitted_at


@dataclass(frozen=True)
class Node:
    """A node as its agent reports it. `kind` is `cpu` or a name of `trainers.run.catalog`; `memory_gb` per slot."""

    name: str
    kind: str
    slots: int
    memory_gb: float
    environments: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()
    park_gb: float = 0.0
    """GiB of host memory for parked jobs, all together."""
    market: str = "on_demand"
    region: str = ""
    price: float = 0.0
    """Per slot and hour; of nodes that are equally good the cheapest is taken."""
    draining: bool = False
    """Nothing starts there; what is there gives way at once."""


@dataclass(frozen=True)
class TenantShare:
    """What a tenant is entitled to. A tenant without one has the defaults."""

    name: str
    weight: float = 1.0
    """Twice the weight, half the price of attained service in the order."""
    guaranteed_slots: int = 0
    """Its own; others may borrow what it does not use and give it back when it does."""
    max_slots: int | None = None
    urgent_slots: int | None = None
    """Slots that its urgent jobs may hold before further ones count as high; None: the policy's share."""


@dataclass(frozen=True)
class Placement:
    """Which slots of which nodes a job gets: `nodes` maps a node's name to slot numbers."""

    nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def slots(self) -> int:
        return sum(len(slots) for slots in self.nodes.values())
