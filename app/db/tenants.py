"""Tenants: made on first use, with their quota and a user id of their own for sandboxes."""

from __future__ import annotations

import re

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.db.models import Tenant
from app.settings import QuotaSettings, SandboxSettings
from cluster.errors import InvalidRequest, Unavailable

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
UIDS = SandboxSettings().uids
_QUOTAS = ("max_queued_jobs", "max_slots", "gpu_hours_per_month")


def ensure_tenant(session: Session, tenant_id: str, quota: QuotaSettings | None = None, uids: range = UIDS) -> Tenant:
    """The tenant's row, made when it is missing; a platform session. A new one gets a user id of `uids`. Raises
    `InvalidRequest` for a name that cannot be one."""
    found = session.get(Tenant, tenant_id)
    if found is not None:
        return found
    if not NAME.fullmatch(tenant_id):
        raise InvalidRequest(
            f"{tenant_id[:80]!r} cannot be a tenant's name",
            code="invalid_tenant",
            param="tenant_id",
            hint="Letters, digits, '.', '_' and '-', at most 64, the first a letter or digit.",
        )
    return _make(session, tenant_id, quota or QuotaSettings(), uids)


def _make(session: Session, tenant_id: str, quota: QuotaSettings, uids: range) -> Tenant:
    session.execute(text("SELECT pg_advisory_xact_lock(hashtext('heliostat tenants'))"))  # two first uses, two user ids
    found = session.get(Tenant, tenant_id, populate_existing=True)
    if found is not None:
        return found
    highest = session.scalar(select(func.max(Tenant.uid)).where(Tenant.uid.between(uids.start, uids.stop - 1)))
    uid = uids.start if highest is None else highest + 1
    if uid not in uids:
        raise Unavailable(
            f"all user ids for tenants, {uids.start} to {uids.stop - 1}, are given away",
            code="no_tenant_uid",
            hint="Delete unused tenants, or widen the range: sandbox.first_uid, sandbox.last_uid.",
        )
    limits = {name: getattr(quota, name) for name in _QUOTAS}
    tenant = Tenant(id=tenant_id, uid=uid, **limits)
    session.add(tenant)
    session.flush()
    return tenant


def set_quota(session: Session, tenant_id: str, quota: QuotaSettings) -> Tenant:
    tenant = ensure_tenant(session, tenant_id, quota)
    for name in _QUOTAS:
        setattr(tenant, name, getattr(quota, name))
    return tenant
