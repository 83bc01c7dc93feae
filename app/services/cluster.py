"""What the cluster has, what a tenant may take of it, and who is asking."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from sqlalchemy import func, select

from app.auth.permissions import effective, require
from app.db.models import Job as JobRow
from app.db.models import Lease, LeaseSlot, Node, Tenant
from app.db.scheduler_rows import WAITING
from app.db.usage import month_gpu_hours
from app.services.access import Caller
from app.services.job_view import unix
from app.services.parts import Parts
from app.services.quota import queued_jobs
from cluster.core.job import Wish
from cluster.core.kinds import KINDS, matches, memory_gb


class ClusterService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def gpu_types(self, caller: Caller) -> list[dict[str, Any]]:
        """Every name that `gpu_type` may have; those that are here first."""
        require(caller.identity, "model:read")
        nodes, held = self._nodes()
        wanted = self._wanted()
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
                    "wanted": sum(asked for kinds, asked in wanted if _would_take(kinds, kind, here)),
                    "memory_gb": max((node.memory_gb for node in here), default=memory_gb(kind)),
                }
            )
        return sorted(shown, key=lambda one: not one["available"])

    def _wanted(self) -> list[tuple[list[str], int]]:
        """Kinds and slots that the waiting jobs ask for; whose they are is not told."""
        kinds, slots = JobRow.shape["kinds"], JobRow.shape["slots"].as_integer()
        with self._parts.database.platform() as session:
            rows = session.execute(select(kinds, slots).where(JobRow.state.in_(WAITING), JobRow.wish == Wish.RUN))
            return [(list(asked or ()), count) for asked, count in rows]

    def nodes(self, caller: Caller) -> list[dict[str, Any]]:
        """And who holds what: a tenant's own jobs, an operator's all."""
        require(caller.identity, "model:read")
        own = None if caller.is_platform and caller.acting_for is None else caller.tenant
        nodes, held = self._nodes()
        jobs = self._holders(own)
        return [
            {
                "id": node.name,
                "object": "node",
                "kind": node.kind,
                "slots": node.slots,
                "free": node.slots - held[node.name],
                "memory_gb": node.memory_gb,
                "market": node.market,
                "region": node.region,
                "price_per_hour": node.price_per_hour,
                "draining": node.draining or node.notice_deadline is not None,
                "seen_at": unix(node.seen_at),
                "jobs": jobs[node.name],
            }
            for node in nodes
        ]

    def _nodes(self) -> tuple[list[Node], Counter[str]]:
        with self._parts.database.platform() as session:
            nodes = list(session.scalars(select(Node).where(Node.lost_at.is_(None)).order_by(Node.name)))
            held = session.execute(select(LeaseSlot.node, func.count()).group_by(LeaseSlot.node))
            return nodes, Counter(dict(held.all()))

    def _holders(self, own: str | None) -> dict[str, list[dict[str, Any]]]:
        """Node → what its open leases hold. A parked one holds memory only."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        asked = select(Lease, JobRow.state, JobRow.priority).join(JobRow, JobRow.id == Lease.job_id)
        asked = asked.where(Lease.released_at.is_(None)).order_by(Lease.node, Lease.granted_at)
        with self._parts.database.platform() as session:
            for lease, state, priority in session.execute(
                asked if own is None else asked.where(Lease.tenant_id == own)
            ):
                found[lease.node].append(
                    {
                        "id": lease.job_id,
                        "tenant": lease.tenant_id,
                        "priority": priority,
                        "state": state,
                        "slots": [] if lease.parked_at else sorted(lease.slots),
                        "since": unix(lease.parked_at or lease.held_since or lease.granted_at),
                        "turn": lease.turn,
                        "told_to": lease.ordered,
                    }
                )
        return found

    def limits(self, caller: Caller) -> dict[str, Any]:
        """Quotas beside what is used of them; and what the service itself allows."""
        tenant = caller.may("model:read")
        http = self._parts.settings.http
        held = func.coalesce(func.sum(func.cardinality(Lease.slots)), 0)
        with self._parts.database.tenant(tenant) as session:
            quota = session.get_one(Tenant, tenant)
            waiting = queued_jobs(session, tenant)
            holding = (Lease.released_at.is_(None), Lease.held_since.is_not(None))
            slots = session.scalars(select(held).where(*holding)).one()
            hours = month_gpu_hours(session, [tenant])[tenant]
        return {
            "object": "limits",
            "tenant": tenant,
            "queued_jobs": {"used": waiting, "limit": quota.max_queued_jobs},
            "slots": {"used": int(slots), "limit": quota.max_slots, "guaranteed": quota.guaranteed_slots},
            "urgent_slots": {"limit": quota.urgent_slots},
            "gpu_hours_this_month": {"used": round(hours, 4), "limit": quota.gpu_hours_per_month},
            "weight": quota.weight,
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


def _would_take(asked: list[str], kind: str, here: list[Node]) -> bool:
    """Whether a job that asks for these kinds counts as waiting for `kind`; one that asks for none, for any that is here."""
    return any(matches(one, kind) for one in asked) if asked else bool(here)
