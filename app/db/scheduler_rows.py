"""The rows as the scheduler sees them: waiting and active jobs, nodes, tenants' shares. Reads only, and only the columns that
count: there may be a hundred thousand jobs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, String, any_, func, literal, or_, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Job, Lease, Node, Tenant
from app.db.shapes import shapes_from_json
from app.db.usage import tenants_out_of_hours
from cluster.core.events import How
from cluster.core.job import ACTIVE, JobState, Placement, Priority, TenantShare, Wish
from cluster.core.job import Job as CoreJob
from cluster.core.job import Node as CoreNode
from cluster.ports import ActiveJob, Attempt, Rows, Shares

MAX_BACKOFF_S = 60.0
WAITING = (JobState.QUEUED, JobState.SUSPENDED)
HELD = (*ACTIVE, JobState.RECOVERING)


def one_of(column: Any, ids: Collection[str]) -> ColumnElement[bool]:
    """As one array: an IN with a parameter for each of hundreds of ids is parsed anew for every number of them."""
    found: ColumnElement[bool] = column == any_(literal(list(ids), ARRAY(String)))
    return found


def _unix(moment: Any) -> Any:
    return func.extract("epoch", moment)


_JOB = select(
    Job.id,
    Job.tenant_id,
    Job.state,
    Job.wish,
    Job.attempt,
    Job.fruitless_attempts,
    Job.priority,
    Job.shape,
    Job.attained_s,
    Job.fingerprint,
    Job.resource_config["region"].astext.label("region"),
    Job.resource_config["market"].astext.label("market"),
    BaseModel.sha256.label("model"),
    _unix(Job.queued_at).label("queued_at"),
    _unix(Job.state_since).label("state_since"),
    _unix(Job.progress_at).label("progress_at"),
).join(BaseModel, BaseModel.id == Job.base_model_id)

_LEASE = select(
    Lease.job_id,
    Lease.attempt,
    Lease.node,
    Lease.slots,
    Lease.ordered,
    _unix(Lease.expires_at).label("expires_at"),
    _unix(Lease.granted_at).label("granted_at"),
    _unix(Lease.held_since).label("held_since"),
    _unix(Lease.parked_at).label("parked_at"),
    func.coalesce(_unix(Lease.ordered_at), 0).label("ordered_at"),
).where(Lease.released_at.is_(None))


def read_rows(session: Session, ids: Collection[str] | None = None, shares: bool = True) -> Rows:
    """In a session that sees one moment (`Database.snapshot`)."""
    now = float(session.scalars(select(_unix(func.now()))).one())
    held = _leases(session, ids)
    jobs = session.execute(_jobs(ids, {job_id for job_id, _ in held})).all()
    return Rows(now, _waiting(jobs, held), _active(jobs, held), read_shares(session) if shares else None)


def read_shares(session: Session) -> Shares:
    """A tenant that has used up its GPU-hours of the month gets nothing new."""
    out = tenants_out_of_hours(session)
    asked = select(Tenant.id, Tenant.weight, Tenant.guaranteed_slots, Tenant.max_slots, Tenant.urgent_slots)
    tenants = {
        name: TenantShare(name, weight, guaranteed, 0 if name in out else most, urgent)
        for name, weight, guaranteed, most, urgent in session.execute(asked)
    }
    plain = {name: TenantShare(name) for name in tenants}
    draining = frozenset(session.scalars(select(Node.name).where(Node.draining)))
    return Shares({name: share for name, share in tenants.items() if share != plain[name]}, draining)


def read_nodes(session: Session) -> list[CoreNode]:
    """Those that the scheduler saw in its last round."""
    rows = session.scalars(select(Node).where(Node.lost_at.is_(None)).order_by(Node.name))
    return [
        CoreNode(
            name=row.name,
            kind=row.kind,
            slots=row.slots,
            memory_gb=row.memory_gb,
            environments=frozenset(row.environments),
            models=frozenset(row.models),
            park_gb=row.park_gb,
            market=row.market,
            region=row.region,
            price=row.price_per_hour,
            draining=row.draining or row.notice_deadline is not None,
        )
        for row in rows
    ]


def _jobs(ids: Collection[str] | None, leased: Collection[str]) -> Select[Any]:
    if ids is not None:
        return _JOB.where(one_of(Job.id, ids)).order_by(Job.queued_at)
    return _JOB.where(or_(Job.state.in_([*HELD, *WAITING]), Job.id.in_(leased))).order_by(Job.queued_at)


def _leases(session: Session, ids: Collection[str] | None) -> dict[Attempt, list[Row[Any]]]:
    asked = _LEASE if ids is None else _LEASE.where(one_of(Lease.job_id, ids))
    rows = session.execute(asked.order_by(Lease.job_id, Lease.attempt, Lease.node)).all()
    return {key: list(group) for key, group in groupby(rows, lambda row: (row.job_id, row.attempt))}


def _waiting(jobs: Sequence[Row[Any]], held: Iterable[Attempt]) -> list[CoreJob]:
    """Not those whose last attempt is still leaving: they wait for its release first."""
    leased = {job_id for job_id, _ in held}
    return [core_job(job) for job in jobs if job.state in WAITING and job.wish == Wish.RUN and job.id not in leased]


def core_job(job: Row[Any]) -> CoreJob:
    shape, *alternatives = shapes_from_json(job.shape)
    backoff_s = min(2.0**job.fruitless_attempts, MAX_BACKOFF_S) if job.fruitless_attempts > 0 else 0.0
    submitted_at, since = float(job.queued_at), float(job.state_since)
    return CoreJob(
        id=job.id,
        tenant=job.tenant_id,
        shape=shape,
        queued_at=since if job.state == JobState.SUSPENDED else submitted_at,
        priority=Priority(job.priority),
        attempt=job.attempt,
        not_before=since + backoff_s if backoff_s else 0.0,
        alternatives=tuple(alternatives),
        submitted_at=submitted_at,
        attained_s=job.attained_s,
        environment=job.fingerprint,
        model=job.model or "",
        region=job.region or "",
        market=job.market if job.market in ("spot", "on_demand") else "",
    )


def _active(jobs: Sequence[Row[Any]], held: dict[Attempt, list[Row[Any]]]) -> list[ActiveJob]:
    by_id = {job.id: job for job in jobs}
    found = [_active_job(by_id[job_id], attempt, leases) for (job_id, attempt), leases in held.items()]
    without = [job for job in jobs if job.state in HELD and (job.id, job.attempt) not in held]
    return found + [_active_job(job, job.attempt, []) for job in without]


def _active_job(job: Row[Any], attempt: int, leases: list[Row[Any]]) -> ActiveJob:
    ordered = next((lease.ordered for lease in leases if lease.ordered), None)
    return ActiveJob(
        job=core_job(job),
        state=JobState(job.state) if attempt == job.attempt else JobState.CANCELLED,
        attempt=attempt,
        lease=Placement({lease.node: tuple(lease.slots) for lease in leases}) if leases else None,
        lease_expires_at=float(min((lease.expires_at for lease in leases), default=0.0)),
        progress_at=float(job.progress_at),
        since=_since(job, leases),
        parked=any(lease.parked_at for lease in leases),
        order=How(ordered) if ordered else None,
        ordered_at=float(max((lease.ordered_at for lease in leases), default=0.0)),
        leaves=job.wish != Wish.RUN,
    )


def _since(job: Row[Any], leases: list[Row[Any]]) -> float:
    """A turn's time counts from the moment that the job trains: what it needs to start is not its doing."""
    moments = [lease.parked_at or lease.held_since or lease.granted_at for lease in leases]
    began = float(max(moments, default=job.state_since))
    return max(began, float(job.state_since)) if job.state == JobState.RUNNING else began
