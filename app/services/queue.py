"""The line of waiting jobs, over all tenants: places and reasons. Whose jobs stand before one is never told."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.auth.permissions import require
from app.db.models import Job as JobRow
from app.db.models import Lease, Node, Tenant
from app.db.repository import Repository
from app.services.access import Caller
from app.services.job_view import unix
from app.services.parts import Parts
from cluster.core.explain import Reason, explain
from cluster.core.job import Job, JobState, Placement, Priority, Shape
from cluster.core.job import Node as CoreNode
from cluster.core.order import turn
from cluster.core.state import ClusterState, Holding, Snapshot


def positions(session: Session) -> dict[str, int]:
    """Job → its place in the line; 1 is the next."""
    return {job.id: place for place, job in enumerate(sorted(waiting_jobs(session), key=turn), start=1)}


def waiting_jobs(session: Session) -> list[Job]:
    rows = session.scalars(select(JobRow).where(JobRow.state == JobState.QUEUED, JobRow.wish == "run"))
    return [_core(row) for row in rows]


def _core(row: JobRow) -> Job:
    shape = Shape(**{**row.shape, "kinds": tuple(row.shape["kinds"])})
    return Job(row.id, row.tenant_id, shape, row.queued_at.timestamp(), Priority(row.priority), row.attempt)


class QueueService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def explain(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Why the job waits, by the scheduler's own rules."""
        tenant = caller.may("model:read", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id)
        with self._parts.database.snapshot() as session:
            now = session.scalars(select(func.now())).one().timestamp()
            found = explain(cluster_state(session), job_id, now)
        reasons = [] if found is None else [{"code": one.code, "message": _told(one)} for one in found.reasons]
        return {
            "id": job.id,
            "object": "fine_tuning.explanation",
            "state": job.state,
            "reason": job.reason,
            "since": unix(job.state_since),
            "position": None if found is None else found.position,
            "reasons": reasons,
        }

    def queue(self, caller: Caller) -> list[dict[str, Any]]:
        """Waiting jobs in their order: a tenant's own, an operator's all."""
        require(caller.identity, "model:read")
        with self._parts.database.platform() as session:
            line = sorted(waiting_jobs(session), key=turn)
        own = None if caller.is_platform and caller.acting_for is None else caller.tenant
        return [_shown(job, place) for place, job in enumerate(line, start=1) if own is None or job.tenant == own]


def _told(reason: Reason) -> str:
    """The scheduler's words, without the id of what may be another tenant's job."""
    return "free slots are kept for a job that has waited longer" if reason.code == "reserved" else reason.message


def _shown(job: Job, place: int) -> dict[str, Any]:
    return {
        "position": place,
        "id": job.id,
        "tenant": job.tenant,
        "priority": str(job.priority),
        "slots": job.shape.slots,
        "memory_gb": job.shape.memory_gb,
        "kinds": list(job.shape.kinds),
        "queued_at": int(job.queued_at),
        "attempt": job.attempt,
    }


def cluster_state(session: Session) -> ClusterState:
    """As the scheduler would rebuild it."""
    nodes = session.scalars(select(Node).where(Node.lost_at.is_(None)))
    limits = session.execute(select(Tenant.id, Tenant.max_slots).where(Tenant.max_slots.is_not(None)))
    return ClusterState.rebuilt(
        Snapshot(
            nodes={row.name: CoreNode(row.name, row.kind, row.slots, row.memory_gb) for row in nodes},
            waiting=tuple(waiting_jobs(session)),
            held=_held(session),
            limits={tenant: most for tenant, most in limits if most is not None},
        )
    )


def _held(session: Session) -> dict[tuple[str, int], Holding]:
    held: dict[tuple[str, int], Holding] = {}
    for lease in session.scalars(select(Lease).where(Lease.released_at.is_(None))):
        key = (lease.job_id, lease.attempt)
        before = held[key].placement.nodes if key in held else {}
        held[key] = Holding(*key, lease.tenant_id, Placement({**before, lease.node: tuple(lease.slots)}))
    return held
