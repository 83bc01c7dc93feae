"""Tenants as operators see them: what each is entitled to, beside what it uses of it now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.orm import Session

from app.auth.permissions import require_whole_scope
from app.db.models import Job, Lease, Node, Tenant
from app.db.usage import month_gpu_hours
from app.schemas.operators import TenantChange
from app.services.access import Caller, no_tenant
from app.services.job_view import unix
from app.services.parts import Parts
from app.services.quota import QUEUED
from cluster.errors import InvalidRequest


class TenantService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        """By name."""
        caller.must_be("operator", "auditor")
        with self._parts.database.snapshot() as session:
            return _views(session, session.scalars(select(Tenant).order_by(Tenant.id)).all())

    def get(self, caller: Caller, name: str) -> dict[str, Any]:
        caller.must_be("operator", "auditor")
        with self._parts.database.snapshot() as session:
            return _views(session, [_found(session, name)])[0]

    def change(self, caller: Caller, name: str, change: TenantChange) -> dict[str, Any]:
        """What is named is set, null to its default. Holds for the scheduler's next decision."""
        caller.must_be("operator")
        require_whole_scope(caller.identity)
        with self._parts.database.platform() as session:
            tenant = _found(session, name, lock=True)
            self._apply(tenant, change)
            session.flush()
            shown = _views(session, [tenant])[0]
            return {**shown, "warnings": _warnings(session)}

    def _apply(self, tenant: Tenant, change: TenantChange) -> None:
        defaults = {"weight": 1.0, "guaranteed_slots": 0, "max_queued_jobs": self._parts.settings.quota.max_queued_jobs}
        for field in change.model_fields_set:
            value = getattr(change, field)
            setattr(tenant, field, defaults.get(field) if value is None else value)
        if tenant.max_slots is not None and tenant.guaranteed_slots > tenant.max_slots:
            raise InvalidRequest(
                f"{tenant.guaranteed_slots} guaranteed slots are more than the {tenant.max_slots} that it may hold",
                code="invalid_value",
                param="guaranteed_slots",
                hint="Raise max_slots, or guarantee fewer.",
            )


def _found(session: Session, name: str, *, lock: bool = False) -> Tenant:
    tenant = session.get(Tenant, name, with_for_update=lock or None)
    if tenant is None:
        raise no_tenant(name)
    return tenant


def _warnings(session: Session) -> list[str]:
    """A promise to all that the cluster cannot keep: not refused, since nodes come and go."""
    promised = session.scalars(select(func.coalesce(func.sum(Tenant.guaranteed_slots), 0))).one()
    there = session.scalars(select(func.coalesce(func.sum(Node.slots), 0)).where(Node.lost_at.is_(None))).one()
    if promised <= there:
        return []
    return [f"{promised} slots are guaranteed in all, the nodes that are here have {there}"]


def _views(session: Session, tenants: Sequence[Tenant]) -> list[dict[str, Any]]:
    names = [tenant.id for tenant in tenants]
    held: ColumnElement[int] = func.sum(func.cardinality(Lease.slots))
    holding = (Lease.tenant_id.in_(names), Lease.released_at.is_(None), Lease.held_since.is_not(None))
    queued = (Job.tenant_id.in_(names), Job.state.in_(QUEUED))
    slots = _by_tenant(session, select(Lease.tenant_id, held).where(*holding).group_by(Lease.tenant_id))
    jobs = _by_tenant(session, select(Job.tenant_id, func.count()).where(*queued).group_by(Job.tenant_id))
    hours = month_gpu_hours(session, names)
    return [
        {
            "id": tenant.id,
            "object": "tenant",
            "created_at": unix(tenant.created_at),
            "weight": tenant.weight,
            "guaranteed_slots": tenant.guaranteed_slots,
            "max_slots": tenant.max_slots,
            "urgent_slots": tenant.urgent_slots,
            "max_queued_jobs": tenant.max_queued_jobs,
            "gpu_hours_per_month": tenant.gpu_hours_per_month,
            "used": {
                "slots": slots.get(tenant.id, 0),
                "queued_jobs": jobs.get(tenant.id, 0),
                "gpu_hours_this_month": round(hours[tenant.id], 4),
            },
        }
        for tenant in tenants
    ]


def _by_tenant(session: Session, counts: Select[str, int]) -> dict[str, int]:
    return {tenant: int(count) for tenant, count in session.execute(counts)}
