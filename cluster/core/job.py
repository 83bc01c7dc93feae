"""A job's states, the one table of what may follow what, and what the scheduler knows of a job. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


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
    each with at least `memory_gb` GiB, over `nodes` nodes."""

    slots: int
    memory_gb: float
    kinds: tuple[str, ...] = ()
    nodes: int = 1


@dataclass(frozen=True)
class Job:
    """A job as the scheduler sees it. `queued_at` in Unix seconds."""

    id: str
    tenant: str
    shape: Shape
    queued_at: float
    priority: Priority = Priority.NORMAL
    attempt: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Node:
    """A node as its agent reports it. `kind` is `cpu` or a name of `trainers.run.catalog`; `memory_gb` per slot."""

    name: str
    kind: str
    slots: int
    memory_gb: float
    environments: frozenset[str] = frozenset()
    models: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Placement:
    """Which slots of which nodes a job gets: `nodes` maps a node's name to slot numbers."""

    nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def slots(self) -> int:
        return sum(len(slots) for slots in self.nodes.values())
