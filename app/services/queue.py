"""The line of waiting jobs, over all tenants: places, reasons, moments, shares. Whose jobs stand before one is never told."""

from __future__ import annotations

from typing import Any

from app.auth.permissions import require
from app.db.repository import Repository
from app.db.usage import month_gpu_hours, tenants_out_of_hours
from app.services.access import Caller
from app.services.fair_shares import Claim, claims_of, fair_shares
from app.services.forecasts import Estimate
from app.services.job_view import WAITS, unix
from app.services.line import LineService, Look
from app.services.parts import Parts
from cluster.core.explain import Explanation, Reason
from cluster.core.forecast import Span
from cluster.core.job import Job

EXPLAINED = 100
"""So many, from the first in line, come with their reasons; `explain` tells those of any."""


class QueueService:
    def __init__(self, parts: Parts, line: LineService) -> None:
        self._parts = parts
        self._line = line

    def explain(self, caller: Caller, job_id: str) -> dict[str, Any]:
        """Why the job waits, by the scheduler's own rules, or what it holds; when it should start and end."""
        tenant = caller.may("model:read", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id)
        look, estimate = self._line.look(), self._line.forecast().of(job_id)
        # The job's own row is newer than a look that is kept.
        found = look.explain([job_id]).get(job_id) if job.state in WAITS else None
        return {
            "id": job.id,
            "object": "fine_tuning.explanation",
            "state": job.state,
            "reason": job.reason,
            "since": unix(job.state_since),
            "position": None if found is None else found.position,
            "ahead": None if found is None else _ahead(look, tenant, found.position),
            "reasons": [] if found is None else self._told(tenant, found),
            "holds": _holds(look, job_id),
            "start": None if found is None else _span(estimate.start),
            "finish": _finish(estimate),
        }

    def queue(self, caller: Caller) -> list[dict[str, Any]]:
        """Waiting jobs in their order: a tenant's own, an operator's all."""
        require(caller.identity, "model:read")
        own = None if caller.is_platform and caller.acting_for is None else caller.tenant
        look, forecast = self._line.look(), self._line.forecast()
        waiting = {job.id: job for job in look.waiting() if own is None or job.tenant == own}
        found = look.explain(list(waiting)[:EXPLAINED])
        places = look.positions() | {job_id: one.position for job_id, one in found.items()}
        return [
            {
                **_shown(job, places.get(job.id)),
                "parked": job.id not in look.positions(),
                "reasons": self._told(job.tenant, found[job.id]) if job.id in found else [],
                "start": _span(forecast.of(job.id).start),
                "finish": _finish(forecast.of(job.id)),
            }
            for job in sorted(waiting.values(), key=lambda job: places.get(job.id, len(places)))
        ]

    def shares(self, caller: Caller) -> list[dict[str, Any]]:
        """What each tenant holds and wants beside its fair share: of its own, and of all others together; operators see
        each."""
        require(caller.identity, "model:read")
        own = None if caller.is_platform and caller.acting_for is None else caller.tenant
        look = self._line.look()
        claims = claims_of(look.snapshot, own)
        fair = fair_shares(sum(node.slots for node in look.snapshot.nodes.values() if not node.draining), claims)
        shown = list(claims) if own is None else [own]
        with self._parts.database.snapshot() as session:
            hours = month_gpu_hours(session, shown)
        rows = [_share(name, claims[name], fair[name], hours[name]) for name in sorted(shown)]
        others = [claim for name, claim in claims.items() if name not in shown]
        return [*rows, _others(others)] if others else rows

    def _told(self, tenant: str, found: Explanation) -> list[dict[str, str]]:
        reasons = [self._discreet(tenant, reason) for reason in found.reasons]
        return [{"code": reason.code, "message": reason.message} for reason in reasons]

    def _discreet(self, tenant: str, reason: Reason) -> Reason:
        """The scheduler's words, without the id of what may be another tenant's job; and with a cause that it does not
        know."""
        if reason.code == "reserved":
            return Reason("reserved", "free slots are kept for a job that has waited longer")
        if reason.code == "tenant_limit":
            with self._parts.database.snapshot() as session:
                if tenant in tenants_out_of_hours(session):
                    return Reason("quota_exceeded", "its tenant has used its GPU-hours of this month")
        return reason


def _ahead(look: Look, tenant: str, position: int) -> dict[str, int]:
    """How many stand before it: of its own tenant, and of all others together."""
    before = [job.tenant == tenant for job in look.snapshot.waiting[: position - 1]]
    return {"own": sum(before), "others": len(before) - sum(before)}


def _holds(look: Look, job_id: str) -> dict[str, Any] | None:
    held = look.held(job_id)
    if held is None:
        return None
    return {
        "slots": {node: list(slots) for node, slots in held.placement.nodes.items()},
        "since": int(held.since),
        "attained_seconds": round(held.attained_s(look.now), 1),
        "parked": held.parked,
        "gives_way": held.yielding is not None,
    }


def _span(span: Span) -> dict[str, int | None]:
    """Unix seconds."""
    return {"p50": None if span.p50 is None else int(span.p50), "p80": None if span.p80 is None else int(span.p80)}


def _finish(estimate: Estimate) -> dict[str, Any]:
    return {**_span(estimate.finish), "based_on": estimate.based_on or None}


def _shown(job: Job, place: int | None) -> dict[str, Any]:
    return {
        "position": place,
        "id": job.id,
        "tenant": job.tenant,
        "priority": str(job.priority),
        "slots": job.shape.slots,
        "memory_gb": job.shape.memory_gb,
        "kinds": list(job.shape.kinds),
        "queued_at": int(job.queued_at),
        "attained_seconds": round(job.attained_s, 1),
        "attempt": job.attempt,
    }


def _share(name: str, claim: Claim, fair: float, hours: float) -> dict[str, Any]:
    return {
        "tenant": name,
        "object": "share",
        "weight": claim.weight,
        "guaranteed_slots": claim.guaranteed,
        "slots": claim.held,
        "waiting_slots": claim.waiting,
        "waiting_jobs": claim.jobs,
        "fair_slots": round(fair, 2),
        "gpu_hours_this_month": round(hours, 4),
    }


def _others(claims: list[Claim]) -> dict[str, Any]:
    """Counts only."""
    return {
        "tenant": None,
        "object": "share",
        "tenants": len(claims),
        "slots": sum(claim.held for claim in claims),
        "waiting_slots": sum(claim.waiting for claim in claims),
        "waiting_jobs": sum(claim.jobs for claim in claims),
    }
