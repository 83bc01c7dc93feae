"""What `cluster` needs from outside, as protocols. `app.db` and `runtime_envs` implement them, `app.wiring` joins them.

A wiring is a module-level function without arguments: Ray ships its name, never a secret."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.core.events import Grant, How, Resume, Yield
from cluster.core.job import Job, JobState, Node, Placement, TenantShare
from cluster.core.policy import Policy

Attempt = tuple[str, int]
"""(job id, attempt)."""


@dataclass(frozen=True)
class ActiveJob:
    """An attempt of a job that holds, or may still hold, slots. Times in Unix seconds of the database's clock."""

    job: Job
    state: JobState
    attempt: int
    lease: Placement | None
    lease_expires_at: float
    progress_at: float
    since: float
    """When its present turn began: when it got its slots; once it trains, when that began; when it is parked, since when."""
    parked: bool = False
    """Its slots are free; its process waits in the memory of its nodes."""
    order: How | None = None
    """Told to give way, and has not yet."""
    ordered_at: float = 0.0
    leaves: bool = False
    """Its tenant wants it paused or cancelled."""

    @property
    def id(self) -> str:
        return self.job.id

    @property
    def key(self) -> Attempt:
        return self.job.id, self.attempt


@dataclass(frozen=True)
class Shares:
    """What tenants are entitled to, and nodes that an operator wants empty."""

    tenants: Mapping[str, TenantShare] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rows:
    """One consistent look at what the scheduler rules over. `now`: the database's clock, Unix seconds."""

    now: float
    waiting: Sequence[Job]
    active: Sequence[ActiveJob]
    """Every attempt with an open lease, and every job in an ACTIVE state or RECOVERING, whatever else is true of it."""
    shares: Shares | None = None
    """None: not asked for."""


class SchedulerStore(Protocol):
    """All raise `Unavailable` while the database is down. Writes name the epoch; a stale one raises `Fenced`. Those that take
    many do them in one transaction; what cannot be done (any more) is left out of the answer."""

    def take_epoch(self) -> int: ...

    def rows(self, ids: Collection[str] | None = None, shares: bool = True) -> Rows:
        """Of these jobs only; None: of all."""
        ...

    def grant(self, epoch: int, grants: Sequence[Grant], ttl_s: float) -> Mapping[str, int]:
        """queued or suspended → preparing with attempt + 1 and its lease; job → attempt. Left out: no longer waiting, or a
        slot is held."""
        ...

    def order(self, epoch: int, yields: Sequence[Yield]) -> Collection[Attempt]:
        """Writes the order into the leases, where the drivers read it. An order to suspend takes the place of one to park."""
        ...

    def resume(self, epoch: int, resumes: Sequence[Resume]) -> Collection[Attempt]:
        """parked → running, with the slots, in the next turn."""
        ...

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        """An ACTIVE state → recovering (compare-and-set on state and attempt)."""
        ...

    def release(self, epoch: int, attempts: Sequence[Attempt]) -> None:
        """The processes of these attempts are confirmed dead: close their leases, and send recovering jobs back to the queue
        (failed, when one made no progress over too many attempts)."""
        ...

    def report_nodes(self, epoch: int, reports: Sequence[NodeReport]) -> None:
        """Which nodes are there now; others are marked lost."""
        ...

    def wait_for_change(self, timeout_s: float) -> frozenset[str] | None:
        """The ids of the jobs that changed, none after the timeout. None: anything may have changed. For one thread."""
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

    def nudge(self, job_id: str, attempt: int) -> None:
        """Tells the driver, if it is there, to look at its rows now; does not wait."""
        ...

    def end(self, job_id: str, attempt: int) -> None:
        """Ends the driver actor of this attempt, and with it what it owns, if it is there."""
        ...


@dataclass(frozen=True)
class EnvironmentCheck:
    """`kind`: `quick` (sizes and times, before each use) or `full` (all contents). `status`: `ok`, `damaged`, `repaired`, or
    `failed` to repair or to read. `detail`: files, or why. `at`: Unix seconds of the node's clock."""

    fingerprint: str
    kind: str
    status: str
    detail: str
    at: float


@dataclass(frozen=True)
class NodeReport:
    """What a node's agent sees: what it offers, and the attempts with a living process on it. `leaves_at`: it was told that
    it goes away then (Unix seconds). `checks`: the newest of each environment and kind. `cpus`: processors that its trainings may
    use, all together; `bf16`: whether these compute in bf16."""

    node: Node
    attempts: frozenset[Attempt] = frozenset()
    leaves_at: float | None = None
    checks: tuple[EnvironmentCheck, ...] = ()
    cpus: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class StagedModel:
    """A base model as nodes keep it. `prefix`: of `cluster.storage`."""

    prefix: str
    sha256: str
    bytes: int


class Nodes(Protocol):
    """The agents of all nodes (`cluster.client` implements it with Ray actors)."""

    def reports(self) -> Sequence[NodeReport]:
        """Of the nodes whose agent answered in time."""
        ...

    def end_attempt(self, node: str, job_id: str, attempt: int) -> bool | None:
        """Kills what lives of an attempt there. True: nothing lives any more; None: the agent cannot be reached."""
        ...

    def expect(self, node: str, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        """As `Children.expect`. Raises `Unavailable`."""
        ...

    def stage_ahead(self, node: str, model: StagedModel) -> None:
        """Returns when it is there, which may take minutes. Raises `HeliostatError`, also where there is no room to spare."""
        ...

    def prepare_ahead(self, node: str, coming: Any) -> None:
        """Raises `Unavailable`."""
        ...


@dataclass(frozen=True)
class PreparedEnvironment:
    """`stages`: seconds that each step took, in order; few of them when it was there already."""

    fingerprint: str
    prefix: Path
    python: Path
    stages: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class CheckedEnvironment:
    """Files by their path from the prefix. `repaired`: all that was damaged, in so many environments (`environments`, by
    fingerprint): those that shared the files."""

    damaged: tuple[str, ...]
    repaired: bool = False
    environments: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        return "repaired" if self.repaired else "damaged" if self.damaged else "ok"


class EnvironmentStore(Protocol):
    """Environments on one node (`runtime_envs.materialize`)."""

    def materialize(self, lock: dict[str, Any]) -> PreparedEnvironment:
        """Makes the prefix of this lock, or finds it; safe under concurrency and SIGKILL. Raises EnvironmentError_,
        Unavailable (the node or a channel is to blame)."""
        ...

    def fingerprint(self, lock: dict[str, Any]) -> str:
        """Of the environment that a lock makes."""
        ...

    def ready(self) -> frozenset[str]:
        """Fingerprints that are ready on this node."""
        ...

    def check(self, fingerprint: str, *, repair: bool) -> CheckedEnvironment | None:
        """Reads every file of one that is ready here (None: it is not), and puts back what changed if told to. Raises
        Unavailable."""
        ...


class Children(Protocol):
    """Training children on one node that are started before their workers are there (`trainers.run.nursery`). `task` is what
    the worker will be told; `cluster` only passes it on."""

    def start(self, task: Any) -> str | None:
        """Where the worker finds it; None: it could not be started."""
        ...

    def expect(self, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        """All that may come next; what was prepared for others is let go. Those of which nothing is known yet."""
        ...

    def prepare(self, coming: Any, agent: Any) -> None:
        """Makes the node ready for what may come, in the background. `agent`: the node's."""
        ...

    def waiting(self) -> frozenset[Attempt]:
        """Attempts that were not granted, with a living process."""
        ...


@dataclass(frozen=True)
class NodeSettings:
    """What a node offers and where it keeps things. `kind` and `slots` None: detect. `memory_gb` per slot."""

    root: Path
    storage_url: str
    kind: str | None = None
    slots: int | None = None
    memory_gb: float | None = None
    park_gb: float | None = None
    """GiB for parked jobs; None: half of what the slots have on `cpu`, nothing elsewhere."""
    market: str = "on_demand"
    region: str = ""
    price_per_hour: float = 0.0
    """Of one slot."""
    full_check_at: str | None = None
    """HH:MM of the node's clock, when all of its environments are read and repaired each day."""
    notice_file: Path | None = None
    """When it is there this node goes away: at the Unix time that it holds, or soon. Whoever watches the cloud's notices
    writes it."""


@dataclass(frozen=True)
class SchedulerSettings:
    """Seconds. `lease_ttl_s`: unrenewed for that long, a lease may be taken after `margin_s` more."""

    lease_ttl_s: float = 30.0
    margin_s: float = 10.0
    poll_s: float = 2.0
    """How often agents and drivers are asked, and rows are read that tell of no change."""
    stage_limit_s: float = 900.0
    """Without progress for so long a job is recovered."""
    driver_gone_s: float = 1.0
    """A driver is dead when two looks, so far apart, do not find it."""
    yield_limit_s: float = 240.0
    """Of an order to give way; then the attempt is ended. The driver's own graces are shorter."""
    ahead: int = 2
    """So many waiting jobs are named to each node, so that it prepares for them; 0: none."""
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class SchedulerParts:
    """`upcoming`: what a node is told of an attempt that a waiting job may begin there; raises `HeliostatError`, also when the
    job has begun it by now. None: nothing. `base_models`: those that every node shall have; None: those of its jobs alone."""

    store: SchedulerStore
    launcher: DriverLauncher
    settings: SchedulerSettings = field(default_factory=SchedulerSettings)
    upcoming: Callable[[Attempt, Node], Any] | None = None
    base_models: Callable[[], Sequence[StagedModel]] | None = None


@dataclass(frozen=True)
class AgentParts:
    """`children` None: workers start their own."""

    environments: EnvironmentStore
    settings: NodeSettings
    children: Children | None = None
