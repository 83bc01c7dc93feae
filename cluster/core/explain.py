"""Why a job waits, in words and stable codes, and its place in the line. Pure; the same rules as the decisions."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.job import Job, Node, Shape
from cluster.core.kinds import matches
from cluster.core.placement import tiers
from cluster.core.state import ClusterState, Round


@dataclass(frozen=True)
class Reason:
    code: str
    message: str


@dataclass(frozen=True)
class Explanation:
    """`position`: 1 is the next in line. `reasons`: empty when the job starts with the next round."""

    position: int
    reasons: tuple[Reason, ...]


def explain(state: ClusterState, job_id: str, now: float) -> Explanation | None:
    """None: the job does not wait."""
    job = state.waiting.get(job_id)
    if job is None:
        return None
    position = 1 + [waiting.id for waiting in state.waiting].index(job_id)
    looks = Round(state, now)
    if any(grant.job.id == job_id for grant in looks.grants()):
        return Explanation(position, ())
    found = [_backoff(job, now), _tenant_limit(state, job), _never_fits(job.shape, list(state.nodes.values()))]
    reasons = tuple(reason for reason in found if reason is not None)
    return Explanation(position, reasons or (_busy(state, job, looks.reserved),))


def _backoff(job: Job, now: float) -> Reason | None:
    if job.not_before <= now:
        return None
    return Reason("backoff", f"its last attempt failed; it is tried again in {job.not_before - now:.0f} s")


def _tenant_limit(state: ClusterState, job: Job) -> Reason | None:
    limit, room = state.limit_of(job.tenant), state.room_of(job.tenant)
    if limit is None or room is None or job.shape.slots <= room:
        return None
    held = limit - room
    return Reason("tenant_limit", f"needs {_slots(job.shape.slots)}; its tenant holds {held} of at most {limit}")


def _never_fits(shape: Shape, nodes: list[Node]) -> Reason | None:
    """Why no node, even empty, could take it; None: one could."""
    if shape.nodes > 1:
        return Reason("spans_nodes", f"asks for {shape.nodes} nodes; a job runs on one")
    if not nodes:
        return Reason("no_nodes", "no node has joined the cluster")
    kind = [node for node in nodes if not shape.kinds or any(matches(asked, node.kind) for asked in shape.kinds)]
    if not kind:
        there = ", ".join(sorted({node.kind for node in nodes}))
        return Reason("kind_unavailable", f"no node offers {' or '.join(shape.kinds)}; there is {there}")
    large = [node for node in kind if node.memory_gb >= shape.memory_gb]
    if not large:
        most = max(node.memory_gb for node in kind)
        return Reason("memory_too_small", f"needs {shape.memory_gb:g} GiB a slot; the largest has {most:g} GiB")
    most_slots = max(node.slots for node in large)
    if most_slots < shape.slots:
        return Reason("gang_too_large", f"needs {_slots(shape.slots)} on one node; the largest node has {most_slots}")
    return None


def _busy(state: ClusterState, job: Job, reserved: dict[str, str]) -> Reason:
    free = state.free()
    able = {node.name for group in tiers(job.shape, state.nodes.values()) for node in group}
    for node, for_job in reserved.items():
        if for_job != job.id and node in able and len(free[node]) >= job.shape.slots:
            return Reason("reserved", f"free slots of node {node} are kept for {for_job}, which has waited long")
    most = max(len(free[node]) for node in able)
    return Reason("slots_busy", f"needs {_slots(job.shape.slots)} on one fitting node; at most {most} are free on one")


def _slots(count: int) -> str:
    return f"{count} slot" + ("s" if count != 1 else "")
