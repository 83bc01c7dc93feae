"""What a tenant may have at a time and in a month. The scheduler holds the limit on slots while jobs run, drivers that on
GPU-hours; here is what is refused at the door."""

from __future__ import annotations

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.db.models import Job, Tenant
from app.db.usage import month_gpu_hours
from app.services.resources import Choice
from cluster.core.job import JobState
from cluster.errors import QuotaExceeded

QUEUED = (JobState.VALIDATING, JobState.QUEUED, JobState.PROVISIONING)
"""What counts as queued: not what is paused (it asks for nothing, and its resume is counted), not what the scheduler or a fault
sent back (that was running)."""


def queued_jobs(session: Session, tenant: str) -> int:
    return session.scalars(select(func.count()).where(Job.tenant_id == tenant, Job.state.in_(QUEUED))).one()


def check_queue(session: Session, tenant: str) -> Tenant:
    """For one more job in the queue, made, resumed or retried. Raises `QuotaExceeded`. Those of one tenant go one after another,
    so that two cannot take the last place."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))"), {"what": f"jobs {tenant}"})
    quota = session.get_one(Tenant, tenant)
    waiting = queued_jobs(session, tenant)
    if waiting >= quota.max_queued_jobs:
        raise QuotaExceeded(
            f"{waiting} jobs wait already, the tenant may have {quota.max_queued_jobs}",
            hint="Wait until some have started, cancel some, or ask an operator for a larger quota.",
        )
    _check_month(session, quota)
    return quota


def _check_month(session: Session, quota: Tenant) -> None:
    if quota.gpu_hours_per_month is None:
        return
    used = month_gpu_hours(session, [quota.id])[quota.id]
    if used >= quota.gpu_hours_per_month:
        raise QuotaExceeded(
            f"the tenant has used {used:.2f} of its {quota.gpu_hours_per_month:g} GPU-hours of this month (UTC)",
            hint="Wait for the next month, or ask an operator for a larger quota: `heliostat limits` shows the use.",
        )


def within_slots(choice: Choice, quota: Tenant) -> Choice:
    """The shapes that the tenant may hold. Raises `QuotaExceeded` when none is left."""
    most = quota.max_slots
    if most is None:
        return choice
    allowed = choice.only(lambda shape: shape.slots <= most)
    if not allowed.options:
        needed = min(shape.slots for shape in choice.shapes)
        raise QuotaExceeded(
            f"the job needs {needed} slots, the tenant may hold {most}",
            param="resource_config.num_gpus",
            hint="Ask for fewer GPUs, or ask an operator for a larger quota.",
        )
    return allowed


def priority_warnings(choice: Choice, quota: Tenant, priority: str) -> list[str]:
    """What is urgent counts as high beyond the tenant's allowance."""
    allowed, slots = quota.urgent_slots, choice.shapes[0].slots
    if priority != "urgent" or allowed is None or slots <= allowed:
        return []
    return [
        f"priority urgent counts as high: the job needs {slots} slots, the tenant's allowance for urgent jobs is {allowed}"
    ]
