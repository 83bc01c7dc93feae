"""How much of the cluster jobs and tenants have used, counted from the leases: the time that their slots were held, less the
switches that the scheduler caused. Budgets, quotas of a month and bills all count by this."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Float, case, cast, func, select, update
from sqlalchemy.orm import Session

from app.db.models import Job, Lease, Tenant
from cluster.core.job import JobState
from trainers.run.ports import Allowance


@dataclass(frozen=True)
class Spent:
    gpu_hours: float
    usd: float


def seconds(interval: ColumnElement[Any]) -> ColumnElement[float]:
    return cast(func.extract("epoch", interval), Float)


def held_s() -> ColumnElement[float]:
    """Of one lease, up to now: not while it is parked."""
    return Lease.held_s + _since(Lease.held_since)


def billed_s() -> ColumnElement[float]:
    """Of one lease, up to now: held, less what switches took that the tenant did not ask for."""
    return func.greatest(held_s() - Lease.unbilled_s - _giving_way_s(), 0.0)


def turn_closed() -> dict[str, Any]:
    """Values for an `UPDATE leases` by which the present turn ends: parked, suspended, released."""
    return {"held_s": held_s(), "unbilled_s": Lease.unbilled_s + _giving_way_s(), "held_since": None}


def settle_start(session: Session, job: Job, was: JobState) -> None:
    """Of a job that leaves `was`: the time that it needed to come back, after its slots were taken from it, is on us."""
    if was is not JobState.PREPARING or not job.moved:
        return
    open_lease = (Lease.job_id == job.id, Lease.attempt == job.attempt, Lease.released_at.is_(None))
    unbilled = Lease.unbilled_s + _since(Lease.held_since)
    session.execute(
        update(Lease).where(*open_lease).values(unbilled_s=unbilled).execution_options(synchronize_session=False)
    )
    job.moved = False


def spent_by(session: Session, job_id: str) -> Spent:
    slot_hours = billed_s() * func.cardinality(Lease.slots) / 3600
    hours, usd = session.execute(
        select(_sum(slot_hours), _sum(slot_hours * Lease.price_per_hour)).where(Lease.job_id == job_id)
    ).one()
    return Spent(hours, usd)


def month_gpu_hours(session: Session, tenants: Collection[str]) -> dict[str, float]:
    """GPU-hours of this calendar month (UTC). A lease that began before counts for its share of time in the month."""
    if not tenants:
        return {}
    now = func.clock_timestamp()
    month = func.date_trunc("month", now, "UTC")
    end = func.coalesce(Lease.released_at, now)
    inside, whole = seconds(end - func.greatest(Lease.granted_at, month)), seconds(end - Lease.granted_at)
    share = case((Lease.granted_at >= month, 1.0), else_=inside / func.greatest(whole, 1e-9))
    hours = _sum(billed_s() * share * func.cardinality(Lease.slots) / 3600)
    recent = Lease.released_at.is_(None) | (Lease.released_at >= month)
    used = session.execute(
        select(Lease.tenant_id, hours).where(Lease.tenant_id.in_(tenants), recent).group_by(Lease.tenant_id)
    )
    return dict.fromkeys(tenants, 0.0) | {tenant: float(spent) for tenant, spent in used}


def tenants_out_of_hours(session: Session) -> frozenset[str]:
    """Tenants that have used up their GPU-hours of the month: nothing of theirs starts before the next one. Only those for
    whom something waits: to add up a month takes a while, and the scheduler asks all the time."""
    waiting = select(Job.tenant_id).where(Job.state.in_((JobState.QUEUED, JobState.SUSPENDED, JobState.PARKED)))
    quotas: dict[str, float] = {
        tenant: hours
        for tenant, hours in session.execute(
            select(Tenant.id, Tenant.gpu_hours_per_month).where(
                Tenant.gpu_hours_per_month.is_not(None), Tenant.id.in_(waiting)
            )
        )
        if hours is not None
    }
    used = month_gpu_hours(session, quotas.keys())
    return frozenset(tenant for tenant, hours in quotas.items() if used[tenant] >= hours)


def allowance(session: Session, job: Job) -> Allowance | None:
    """For how long the job may go on holding what it holds; None: for as long as it likes."""
    left = [*_budget_left(session, job), *_month_left(session, job)]
    return min(left, key=lambda one: one.left_s) if left else None


def budget_spent(session: Session, job: Job) -> str | None:
    """The limit that is used up, in words."""
    if not job.budget:
        return None
    spent = spent_by(session, job.id)
    hours, usd = job.budget.get("gpu_hours"), job.budget.get("usd")
    if hours is not None and spent.gpu_hours >= hours:
        return f"{hours:g} GPU-hours"
    return f"{usd:g} USD" if usd is not None and spent.usd >= usd else None


def _budget_left(session: Session, job: Job) -> list[Allowance]:
    if not job.budget:
        return []
    spent = spent_by(session, job.id)
    slots, usd_per_hour = session.execute(
        select(
            _sum(cast(func.cardinality(Lease.slots), Float)), _sum(func.cardinality(Lease.slots) * Lease.price_per_hour)
        ).where(Lease.job_id == job.id, Lease.released_at.is_(None))
    ).one()
    hours, usd = job.budget.get("gpu_hours"), job.budget.get("usd")
    found = []
    if hours is not None and slots:
        found.append(Allowance((hours - spent.gpu_hours) * 3600 / slots, "budget_reached", f"{hours:g} GPU-hours"))
    if usd is not None and usd_per_hour:
        found.append(Allowance((usd - spent.usd) * 3600 / usd_per_hour, "budget_reached", f"{usd:g} USD"))
    return found


def _month_left(session: Session, job: Job) -> list[Allowance]:
    """At the rate at which all jobs of the tenant use it now."""
    hours = session.scalar(select(Tenant.gpu_hours_per_month).where(Tenant.id == job.tenant_id))
    if hours is None:
        return []
    rate = session.scalar(
        select(_sum(cast(func.cardinality(Lease.slots), Float))).where(
            Lease.tenant_id == job.tenant_id, Lease.released_at.is_(None), Lease.held_since.is_not(None)
        )
    )
    left = hours - month_gpu_hours(session, [job.tenant_id])[job.tenant_id]
    return [Allowance(left * 3600 / max(rate or 0.0, 1.0), "quota_exceeded", f"{hours:g} GPU-hours a month")]


def _since(moment: ColumnElement[Any] | Any) -> ColumnElement[float]:
    """Seconds up to now, or to the end of the lease; 0 where there is no such moment."""
    end = func.coalesce(Lease.released_at, func.clock_timestamp())
    return func.coalesce(func.greatest(seconds(end - moment), 0.0), 0.0)


def _giving_way_s() -> ColumnElement[float]:
    """From the scheduler's order on, as long as the slots are still held."""
    began = func.greatest(Lease.ordered_at, Lease.held_since)
    return case((Lease.ordered_at.is_(None) | Lease.held_since.is_(None), 0.0), else_=_since(began))


def _sum(values: ColumnElement[Any]) -> ColumnElement[float]:
    return func.coalesce(func.sum(values), 0.0)
