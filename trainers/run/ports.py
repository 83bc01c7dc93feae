"""What a job's driver needs of the database, as a protocol (`app.db` implements it). Every write names the attempt; a stale one
raises `Fenced`. While the database is down all raise `Unavailable`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.core.events import How
from cluster.core.job import JobState, Node, Placement, Wish
from trainers.config import Hyperparams

OUT_OF_MEMORY = ("out_of_memory", "memory_limit_exceeded")
"""Codes of failures that fewer rows in a forward pass may mend."""


@dataclass(frozen=True)
class LastCheckpoint:
    step: int
    attempt: int
    prefix: str
    """Storage prefix of its files."""
    files: dict[str, str]
    """File name → sha256."""


@dataclass(frozen=True)
class Script:
    """What a job of method `custom` runs. `files` (name → sha256) lie under `prefix`; without code both are empty."""

    entrypoint: list[str]
    params: dict[str, Any]
    prefix: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """All that one attempt of a job needs. Prefixes are those of `cluster.storage`."""

    job_id: str
    tenant: str
    attempt: int
    placement: Placement
    kind: str
    """`cpu` or an accelerator's name."""
    method: str
    training_type: str
    task: str
    hyperparams: Hyperparams
    precision: str
    memory_limit_gb: float | None
    base_model_name: str
    base_model_prefix: str
    base_model_sha256: str
    adapter_prefix: str | None
    """An adapter to continue from, or a checkpoint (with all weights, where it is of a full training); None: the base as it
    is."""
    dataset_key: str
    dataset_sha256: str
    validation_key: str | None
    validation_sha256: str | None
    lock: dict[str, Any]
    fingerprint: str
    checkpoint: LastCheckpoint | None
    output_model: str
    max_runtime_s: float | None
    ran_s: float
    """Seconds that earlier attempts have run."""
    metadata: dict[str, Any] = field(default_factory=dict)
    uid: int | None = None
    """The tenant's own user id, for sandboxes."""
    script: Script | None = None
    """Of method `custom`."""
    best: LastCheckpoint | None = None
    """The checkpoint with the lowest validation loss so far, where it is another one than `checkpoint`."""
    outputs: tuple[str, ...] = ()
    """More forms of the model that were asked for: merged, gguf."""
    short_of_memory: bool = False
    """An earlier attempt ran out of memory: this one has half as many rows in a forward pass."""


@dataclass(frozen=True)
class Heartbeat:
    """`fenced`: another attempt, or nobody, owns this job now: end the child and leave. `order`: the scheduler's, to give
    way; it stands until it is obeyed. `parked`: the attempt's slots are free for others."""

    wish: Wish
    fenced: bool
    order: How | None = None
    parked: bool = False


@dataclass(frozen=True)
class Allowance:
    """For how many more seconds an attempt may hold its slots (negative: it should have left), and what sets the limit: an error
    code, and the limit in words."""

    left_s: float
    code: str
    limit: str


@dataclass(frozen=True)
class StepRow:
    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class DriverStore(Protocol):
    def assignment(self, job_id: str, attempt: int) -> Assignment: ...

    def upcoming(self, job_id: str, attempt: int, node: Node) -> Assignment:
        """Of a job that waits for this attempt, as if that had all of `node`. Raises `Fenced` when it is not the next one."""
        ...

    def heartbeat(self, job_id: str, attempt: int, ttl_s: float) -> Heartbeat:
        """Renews the lease; does not raise `Fenced`."""
        ...

    def allowance(self, job_id: str, attempt: int) -> Allowance | None:
        """What budget and quotas leave, counted from the leases; None: no limit. Does not raise `Fenced`."""
        ...

    def move(
        self,
        job_id: str,
        attempt: int,
        then: JobState,
        *,
        reason: str,
        error: dict[str, str | None] | None = None,
    ) -> bool:
        """Compare-and-set from any state that `then` may follow, with its event, in one transaction. False: it may not."""
        ...

    def park(self, job_id: str, attempt: int) -> bool:
        """running → parked, and its slots are free, in one transaction; True also when that is so already. False: it was not
        ordered (any more), or the job is in a state that cannot be parked."""
        ...

    def event(
        self,
        job_id: str,
        attempt: int,
        type: str,
        message: str,
        *,
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> None: ...

    def record_steps(self, job_id: str, attempt: int, steps: Sequence[StepRow]) -> None:
        """One row per (job, step); a step computed again takes the place of its first row. Writes one `metrics` event."""
        ...

    def commit_checkpoint(
        self, job_id: str, attempt: int, step: int, prefix: str, files: dict[str, str], metrics: dict[str, Any]
    ) -> Sequence[str]:
        """The prefixes of checkpoints that the job keeps no longer: their objects may go."""
        ...

    def finish(
        self,
        job_id: str,
        attempt: int,
        prefix: str,
        files: dict[str, str],
        metrics: dict[str, Any],
        lineage: dict[str, Any],
    ) -> str:
        """archiving → succeeded, with the model version, in one transaction; `<name>@<version>`. Again: the same answer."""
        ...
