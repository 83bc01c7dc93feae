"""What `cluster` needs from outside, as protocols. `app.db` and `runtime_envs` implement them, `app.wiring` joins them.

A wiring is a module-level function without arguments: Ray ships its name, never a secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.core.job import Job, JobState, Node, Placement


@dataclass(frozen=True)
class ActiveJob:
    """A job that holds, or may still hold, slots. `lease_expires_at` in Unix seconds of the database's clock."""

    id: str
    tenant: str
    state: JobState
    attempt: int
    lease: Placement | None
    lease_expires_at: float
    progress_at: float


@dataclass(frozen=True)
class Rows:
    """One consistent look at what the scheduler rules over. `now`: the database's clock, Unix seconds."""

    now: float
    waiting: Sequence[Job]
    active: Sequence[ActiveJob]
    """Every job with an open lease, and every job in an ACTIVE state or RECOVERING, whatever else is true of it."""
    slot_limits: Mapping[str, int] = field(default_factory=dict)
    """Tenants that may hold only so many slots at a time."""


class SchedulerStore(Protocol):
    """All raise `Unavailable` while the database is down. Writes name the epoch; a stale one raises `Fenced`."""

    def take_epoch(self) -> int: ...

    def rows(self) -> Rows: ...

    def grant(self, epoch: int, job: Job, placement: Placement, ttl_s: float) -> int | None:
        """queued → preparing with attempt + 1 and its lease, in one transaction. None: the job is no longer waiting."""
        ...

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        """An ACTIVE state → recovering (compare-and-set on state and attempt)."""
        ...

    def release(self, epoch: int, job_id: str, attempt: int) -> None:
        """The processes of this attempt are confirmed dead: close its lease, and send a recovering job back to the
        queue (failed, when it made no progress over too many attempts)."""
        ...

    def report_nodes(self, epoch: int, nodes: Sequence[Node]) -> None:
        """Which nodes are there now; others are marked lost."""
        ...

    def wait_for_change(self, timeout_s: float) -> None:
        """Returns when a job, a wish or a lease changed, or after the timeout."""
        ...


class DriverLauncher(Protocol):
    """Starts and finds job drivers (Ray actors). `cluster` does not know what a driver does. All raise `Unavailable`
    while Ray does not answer."""

    def start(self, job_id: str, attempt: int) -> None:
        """Idempotent by (job, attempt)."""
        ...

    def alive(self, job_id: str, attempt: int) -> bool | None:
        """None: it is there but did not answer in time (still starting, or busy); that alone never counts as dead."""
        ...

    def end(self, job_id: str, attempt: int) -> None:
        """Ends the driver actor of this attempt and its Train controller, if they are there."""
        ...


@dataclass(frozen=True)
class NodeReport:
    """What a node's agent sees: what it offers, and the (job, attempt) pairs with a living process on it."""

    node: Node
    attempts: frozenset[tuple[str, int]] = frozenset()


class Nodes(Protocol):
    """The agents of all nodes (`cluster.client` implements it with Ray actors)."""

    def reports(self) -> Sequence[NodeReport]:
        """Of the nodes whose agent answered in time."""
        ...

    def end_attempt(self, node: str, job_id: str, attempt: int) -> bool | None:
        """Kills what lives of an attempt there. True: nothing lives any more; None: the agent cannot be reached."""
        ...


@dataclass(frozen=True)
class PreparedEnvironment:
    fingerprint: str
    prefix: Path
    python: Path


class EnvironmentStore(Protocol):
    """Environments on one node (`runtime_envs.materialize`)."""

    def materialize(self, lock: dict[str, Any]) -> PreparedEnvironment:
        """Makes the prefix of this lock, or finds it; safe under concurrency and SIGKILL. Raises EnvironmentError_."""
        ...

    def ready(self) -> frozenset[str]:
        """Fingerprints that are ready on this node."""
        ...


@dataclass(frozen=True)
class NodeSettings:
    """What a node offers and where it keeps things. `kind` and `slots` None: detect. `memory_gb` per slot."""

    root: Path
    storage_url: str
    kind: str | None = None
    slots: int | None = None
    memory_gb: float | None = None


@dataclass(frozen=True)
class SchedulerSettings:
    """Seconds. `lease_ttl_s`: unrenewed for that long, a lease may be taken after `margin_s` more."""

    lease_ttl_s: float = 30.0
    margin_s: float = 10.0
    poll_s: float = 2.0
    stage_limit_s: float = 900.0
    """Without progress for so long a job is recovered."""
    driver_gone_s: float = 1.0
    """A driver is dead when two looks, so far apart, do not find it."""
    reserve_after_s: float = 300.0
    """A job that waited for so long has a node kept free for it."""


@dataclass(frozen=True)
class SchedulerParts:
    store: SchedulerStore
    launcher: DriverLauncher
    settings: SchedulerSettings = field(default_factory=SchedulerSettings)


@dataclass(frozen=True)
class AgentParts:
    environments: EnvironmentStore
    settings: NodeSettings
