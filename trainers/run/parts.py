"""What the pieces of a job's Ray side say to each other: settings, the task of a worker, and the ports behind which Ray,
the node agents and the worker group stand. No Ray here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.core.job import JobState
from cluster.ports import NodeReport
from runtime_envs.sandbox.spec import Isolation, Limits
from trainers.run.ports import DriverStore

GIB = 1024**3
Record = dict[str, Any]
"""One thing that a worker tells its driver: a message of the child (`trainers.protocol`) or the worker's own: `spawned`,
`stored` {step, prefix, files, metrics}, `artifact` {step, prefix, files, metrics}, `stopped`, `lost` {exit_code, signal};
each with `at`, the worker's clock; what ends an attempt with `log_tail`, the last lines that the child printed."""

Order = dict[str, Any]
"""What the driver tells a worker: {order: command, id, command}, {order: saved, step}, {order: end}, and {order: release, action}
those of a gang's other nodes."""


class DriverGone(Exception):
    """The driver of this worker is no more: the worker ends its child and leaves."""


class WorkersLost(Exception):
    """The worker group could not start or did not live to the end of its work."""


@dataclass(frozen=True)
class DriverSettings:
    """Of every job. `storage_url` as in `cluster.storage`; seconds."""

    storage_url: str
    lease_ttl_s: float = 30.0
    checkpoint_every_s: float = 60.0
    exact_match_rows: int = 200
    stop_grace_s: float = 120.0
    """From the tenant's wish to write a checkpoint and stop until the child is killed."""
    yield_grace_s: float = 60.0
    """From the scheduler's order to park until the child is told to write a checkpoint and stop, and from that until it is
    killed: it goes on from its last checkpoint then."""
    relay_s: float = 0.5
    """How often a worker speaks to its driver: steps travel in batches, orders in the answers."""
    max_output_bytes: int = 256 * GIB
    """Most that one checkpoint or artifact may have."""
    max_log_bytes: int = GIB // 4
    """Most output of an attempt that is kept."""
    max_waiting_records: int = 20_000
    """Writes that wait for the database before the training is held up."""
    isolation: Isolation = Isolation.OFF
    sandbox: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class DriverParts:
    """What a wiring (a module-level function without arguments) gives a driver."""

    store: DriverStore
    settings: DriverSettings


@dataclass(frozen=True)
class WorkerTask:
    """What one worker of an attempt is told, by an actor call: never in Train's arguments, which lie in the object store.

    `config`: a `trainers.config.TrainConfig` as a dict, with this node's part of the ranks. `visible_devices`: the leased GPUs
    by number. `uid`: the tenant's own user id, for sandboxes. `memory_gb`: GiB of the node's memory that all of the child may
    take. `keeper`: the folder in which the child waits that the node's agent has started already. `address`: this node's, where
    the gang spans several; its ranks meet over the network then."""

    job_id: str
    attempt: int
    tenant: str
    fingerprint: str
    python: str
    scratch: str
    config: dict[str, Any]
    visible_devices: str
    threads: int
    settings: DriverSettings
    uid: int | None = None
    memory_gb: float | None = None
    keeper: str | None = None
    address: str | None = None

    @property
    def prefix(self) -> str:
        """Of everything of this tenant in storage."""
        return f"tenants/{self.tenant}"

    @property
    def mark(self) -> str:
        return f"{self.job_id}/{self.attempt}"


class AgentHandle(Protocol):
    """A node's agent (`cluster.agent`). Raises the agent's own `HeliostatError`, else `Unavailable`."""

    def report(self) -> NodeReport: ...

    def prepare_environment(self, lock: dict[str, Any]) -> dict[str, Any]: ...

    def stage_model(self, prefix: str, sha256: str, files: dict[str, str] | None = None) -> str: ...

    def stage_attempt(
        self, job_id: str, attempt: int, files: dict[str, tuple[str, str]], *, ahead: bool = False
    ) -> str: ...

    def start_child(self, task: WorkerTask) -> str | None:
        """Before there is a worker; where that finds it, None: the worker is to start it."""
        ...

    def meeting_point(self) -> str:
        """host:port: how other nodes reach this one, and where nobody listens at this moment."""
        ...

    def clear_ahead(self, job_id: str, attempt: int) -> None: ...

    def clear_attempt(self, job_id: str, attempt: int) -> None: ...


class Agents(Protocol):
    def of(self, node: str) -> AgentHandle:
        """Raises `Unavailable` when the node has no agent."""
        ...


@dataclass(frozen=True)
class GangRequest:
    """A worker on each of `nodes`, the first of which has rank 0; `name` is what operators see in the dashboard."""

    job_id: str
    attempt: int
    name: str
    nodes: tuple[str, ...]
    fingerprint: str


class Gang(Protocol):
    """The worker group of one attempt (Ray Train)."""

    def run(self, request: GangRequest) -> None:
        """Blocks until all workers have returned. Raises `WorkersLost`."""
        ...

    def end(self) -> None:
        """Ends what lives of it, at once; does nothing when nothing does."""
        ...


class DriverHandle(Protocol):
    """The driver as the worker of one node sees it. Both raise `DriverGone`."""

    def task(self) -> WorkerTask: ...

    def relay(self, records: list[Record]) -> list[Order]: ...


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `state` None: fenced, or the driver itself broke; then nothing more is written."""

    state: JobState | None
    reason: str
    error: dict[str, str | None] | None = None
    artifact: Record | None = field(default=None)

    @property
    def is_hearsay(self) -> bool:
        """A rank that knows only that another one is gone: why, that one's own node may be about to say."""
        return self.error is not None and self.error.get("code") in ("rank_lost", "rank_not_responding")


Report = Callable[[str, float], None]
"""Told the name of a stage and its seconds."""
