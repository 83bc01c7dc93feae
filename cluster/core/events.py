"""What happens to a cluster, as the state machine is told. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.job import Job, Node, Placement


@dataclass(frozen=True)
class NodeJoined:
    """A node is there, or what it offers has changed."""

    node: Node


@dataclass(frozen=True)
class NodeLost:
    """No new job goes there; what is held on it stays held until its release is confirmed."""

    name: str


@dataclass(frozen=True)
class TenantLimited:
    """The tenant may hold `max_slots` at a time; None: as many as there are."""

    tenant: str
    max_slots: int | None


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
    """An attempt holds slots; its job waits no more."""

    job_id: str
    attempt: int
    tenant: str
    placement: Placement


@dataclass(frozen=True)
class JobReleased:
    """No process of the attempt lives: its slots are free."""

    job_id: str
    attempt: int


Event = NodeJoined | NodeLost | TenantLimited | JobQueued | JobRemoved | JobGranted | JobReleased


@dataclass(frozen=True)
class Grant:
    """Give the job these slots. It counts once it is durable and comes back as `JobGranted`."""

    job: Job
    placement: Placement


Decision = Grant
