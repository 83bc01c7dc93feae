"""What the cluster has, what a tenant may take of it, and who is asking."""

from __future__ import annotations

from collections import Counter
from typing import Any

from sqlalchemy import func, select

from app.auth.permissions import effective, require
from app.db.models import Job as JobRow
from app.db.models import Lease, LeaseSlot, Node, Tenant
from app.services.access import Caller
from app.services.job_view import unix
from app.services.parts import Parts
from cluster.core.job import ACTIVE, TERMINAL, JobState
from cluster.core.kinds import KINDS, matches, memory_gb


class ClusterService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def gpu_types(self, caller: Caller) -> list[dict[str, Any]]:
        """Every name that `gpu_type` may have; those that are here first."""
        require(caller.identity, "model:read")
        nodes, held = self._nodes()
        shown = []
        for kind in KINDS:
            here = [node for node in nodes if matches(kind, node.kind)]
            slots = sum(node.slots for node in here)
            shown.append(
                {
                    "id": kind,
                    "object": "gpu_type",
                    "available": bool(here),
                    "slots": slots,
                    "free": slots - sum(held[node.name] for node in here),
                    "memory_gb": max((node.memory_gb for node in here), default=memory_gb(kind)),
                }
            )
        return sorted(shown, key=lambda one: not one["available"])

    def nodes(self, caller: Caller) -> list[dict[str, Any]]:
        require(caller.identity, "model:read")
        nodes, held = self._nodes()
        return [
            {
                "id": node.name,
                "object": "node",
                "kind": node.kind,
                "slots": node.slots,
                "free": node.slots - held[node.name],
                "memory_gb": node.memory_gb,
                "seen_at": unix(node.seen_at),
            }
            for node in nodes
        ]

    def _nodes(self) -> tuple[list[Node], Counter[str]]:
        with self._parts.database.platform() as session:
            nodes = list(session.scalars(select(Node).where(Node.lost_at.is_(None)).order_by(Node.name)))
            held = session.execute(select(LeaseSlot.node, func.count()).group_by(LeaseSlot.node))
            return nodes, Counter(dict(held.all()))

    def limits(self, caller: Caller) -> dict[str, Any]:
        """Quotas beside what is used of them; and what the service itself allows."""
        tenant = caller.may("model:read")
        http = self._parts.settings.http
        idle = [str(state) for state in JobState if state not in TERMINAL | ACTIVE]
        held = func.coalesce(func.sum(func.cardinality(Lease.slots)), 0)
        with self._parts.database.tenant(tenant) as session:
            quota = session.get_one(Tenant, tenant)
            waiting = session.scalars(select(func.count()).where(JobRow.state.in_(idle))).one()
            slots = session.scalars(select(held).where(Lease.released_at.is_(None))).one()
        return {
            "object": "limits",
            "tenant": tenant,
            "queued_jobs": {"used": waiting, "limit": quota.max_queued_jobs},
            "slots": {"used": int(slots), "limit": quota.max_slots},
            "max_body_bytes": http.max_body_bytes,
            "max_upload_bytes": http.max_upload_bytes,
        }

    def me(self, caller: Caller) -> dict[str, Any]:
        identity = caller.identity
        return {
            "object": "identity",
            "tenant": identity.tenant,
            "subject": identity.subject,
            "role": identity.role,
            "scope": " ".join(effective(identity)),
            "token_id": identity.jti,
        }
