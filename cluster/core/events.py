"""What happens to a cluster, as the state machine is told, and what it decides. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cluster.core.job import Job, Node, Placement, Shape, TenantShare


class How(StrEnum):
    """How a running job gives way."""

    PARK = "park"
    """Its state goes to host memory, its process stays: it can go on where it was, within seconds."""
    SUSPEND = "suspend"
    """It writes a checkpoint and ends: it can go on anywhere."""


@dataclass(frozen=True)
class NodeJoined:
    """A node is there, or what it offers has changed."""

    node: Node


@dataclass(frozen=True)
class NodeLost:
    """No new job goes there; what is held on it stays held until its release is confirmed."""

    name: str


@dataclass(frozen=True)
class TenantSet:
    """What a tenant is entitled to has changed."""

    share: TenantShare


@dataclass(frozen=True)
class TenantUnset:
    """The tenant has the defaults again."""

    name: str


@dataclass(frozen=True)
class JobQueued:
    """A job waits, or what is known of a waiting job has changed."""

    job: Job


@dataclass(frozen=True)
class JobRemoved:
    """A job waits no more: cancelled, paused, or given up."""

    job_id: str


@dataclass(frozen=True)
class JobGranted:
    """An attempt holds slots since `since`; its job waits no more. So too when a parked attempt was resumed, when an
    order to give way was taken back, or when what is known of the job has changed. `parked`: it holds only memory."""

    job: Job
    attempt: int
    placement: Placement
    since: float
    parked: bool = False


@dataclass(frozen=True)
class JobYielding:
    """The attempt was told to give way. It still holds its slots; they count as coming free."""

    job_id: str
    attempt: int
    how: How


@dataclass(frozen=True)
class JobParked:
    """Its slots are free, its process waits in its nodes' memory: `at` ends the turn."""

    job_id: str
    attempt: int
    at: float


@dataclass(frozen=True)
class JobReleased:
    """No process of the attempt lives: its slots are free."""

    job_id: str
    attempt: int


Event = (
    NodeJoined
    | NodeLost
    | TenantSet
    | TenantUnset
    | JobQueued
    | JobRemoved
    | JobGranted
    | JobYielding
    | JobParked
    | JobReleased
)


@dataclass(frozen=True)
class Grant:
    """Give the job these slots, in a new attempt. It counts once it is durable and comes back as `JobGranted`.
    `shape`: which of the job's shapes it is."""

    job: Job
    placement: Placement
    shape: Shape


@dataclass(frozen=True)
class Resume:
    """A parked attempt takes slots of its own nodes again; comes back as `JobGranted`."""

    job_id: str
    attempt: int
    placement: Placement


@dataclass(frozen=True)
class Yield:
    """Tell the attempt to give way; comes back as `JobYielding`. A parked one can only be told to suspend."""

    job_id: str
    attempt: int
    how: How
    reason: str


Decision = Grant | Resume | Yield
