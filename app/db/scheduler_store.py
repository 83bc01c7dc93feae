"""`cluster.ports.SchedulerStore` over PostgreSQL: what the scheduler reads and writes. Every write checks the
scheduler's epoch under a lock, so that a scheduler that was replaced changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, load_only

from app.db.listen import JOBS, Listener
from app.db.models import Checkpoint, Control, Job, Lease, LeaseSlot, Node, Step, Tenant
from app.db.session import Database
from app.db.transitions import Change, transition
from cluster.core.job import ACTIVE, JobState, Placement, Priority, Shape, Wish
from cluster.core.job import Job as CoreJob
from cluster.core.job import Node as CoreNode
from cluster.errors import Fenced
from cluster.ports import ActiveJob, Rows

EPOCH = "scheduler_epoch"
MAX_BACKOFF_S = 60.0
HELD = [*ACTIVE, JobState.RECOVERING]
_FEW_COLUMNS = load_only(  # not the lock and the request: they are large, and there may be thousands of jobs
    Job.tenant_id,
    Job.state,
    Job.wish,
    Job.attempt,
    Job.fruitless_attempts,
    Job.priority,
    Job.shape,
    Job.queued_at,
    Job.state_since,
    Job.progress_at,
    raiseload=True,
)


class SqlSchedulerStore:
    """`max_fruitless_attempts`: so many attempts in a row without a new step or checkpoint, and a job is given up."""

    def __init__(self, database: Database, max_fruitless_attempts: int = 3) -> None:
        self._database = database
        self._max_fruitless_attempts = max_fruitless_attempts
        self._listener = Listener(database.dsn, JOBS)

    def take_epoch(self) -> int:
        with self._database.platform() as session:
            first = insert(Control).values(name=EPOCH, value=1)
            taken = first.on_conflict_do_update(index_elements=[Control.name], set_={"value": Control.value + 1})
            return session.execute(taken.returning(Control.value)).scalar_one()

    def rows(self) -> Rows:
        with self._database.snapshot() as session:
            now = session.scalars(select(func.extract("epoch", func.now()))).one()
            leases = session.scalars(
                select(Lease).where(Lease.released_at.is_(None)).order_by(Lease.job_id, Lease.attempt)
            ).all()
            held = {key: list(group) for key, group in groupby(leases, lambda lease: (lease.job_id, lease.attempt))}
            leased = {job_id for job_id, _ in held}
            wanted = or_(Job.state.in_([*HELD, JobState.QUEUED]), Job.id.in_(leased))
            jobs = session.scalars(select(Job).where(wanted).order_by(Job.queued_at).options(_FEW_COLUMNS)).all()
            limits = session.execute(select(Tenant.id, Tenant.max_slots).where(Tenant.max_slots.is_not(None))).all()
            return Rows(
                float(now),
                _waiting(jobs, leased),
                _active(jobs, held),
                {tenant: most for tenant, most in limits if most is not None},
            )

    def grant(self, epoch: int, job: CoreJob, placement: Placement, ttl_s: float) -> int | None:
        """None also when a slot is held, or the job's last attempt still has its lease."""
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            row = _lock(session, job.id)
            if row is None or not _may_start(session, row, job.attempt):
                return None
            kinds = _kinds(session, placement)
            row.attempt += 1
            row.epoch = epoch
            row.granted = _granted(placement, kinds)
            try:
                with session.begin_nested():
                    _take_slots(session, row, placement, kinds, ttl_s)
            except IntegrityError:  # the primary key of lease_slots: somebody holds one of them
                session.rollback()
                return None
            transition(session, row, Change(JobState.PREPARING, f"attempt {row.attempt} on {_where(placement)}"))
            return row.attempt

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            row = _lock(session, job_id)
            if row is None or row.attempt != attempt or row.state not in ACTIVE:
                return False
            return transition(session, row, Change(JobState.RECOVERING, reason))

    def release(self, epoch: int, job_id: str, attempt: int) -> None:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            row = _lock(session, job_id)
            session.execute(delete(LeaseSlot).where(LeaseSlot.job_id == job_id, LeaseSlot.attempt == attempt))
            session.execute(
                update(Lease)
                .where(Lease.job_id == job_id, Lease.attempt == attempt, Lease.released_at.is_(None))
                .values(released_at=func.clock_timestamp())
            )
            if row is not None and row.attempt == attempt and row.state == JobState.RECOVERING:
                self._send_on(session, row)

    def report_nodes(self, epoch: int, nodes: Sequence[CoreNode]) -> None:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            for node in nodes:
                row = _node_row(node)
                new = insert(Node).values(**row)
                session.execute(new.on_conflict_do_update(index_elements=[Node.name], set_=row))
            gone = Node.lost_at.is_(None) & Node.name.not_in([node.name for node in nodes])
            session.execute(update(Node).where(gone).values(lost_at=func.now()))

    def wait_for_change(self, timeout_s: float) -> None:
        self._listener.wait(timeout_s)

    def close(self) -> None:
        self._listener.close()

    def _send_on(self, session: Session, job: Job) -> None:
        """A recovering job whose processes are dead: what the tenant asked for meanwhile, else the queue or the end."""
        if job.wish == Wish.CANCEL:
            change = Change(JobState.CANCELLED, "cancel was asked for")
        elif job.wish == Wish.PAUSE:
            change = Change(JobState.PAUSED, "pause was asked for")
        else:
            job.fruitless_attempts = 0 if _made_progress(session, job) else job.fruitless_attempts + 1
            if job.fruitless_attempts >= self._max_fruitless_attempts:
                change = Change(JobState.FAILED, "given up", _gave_up(job))
            else:
                change = Change(JobState.QUEUED, f"goes on after: {job.reason}")
        transition(session, job, change)


def _check_epoch(session: Session, epoch: int) -> None:
    """Held shared until the transaction ends: a new scheduler's `take_epoch` waits for it. Raises `Fenced`."""
    current = session.scalar(select(Control.value).where(Control.name == EPOCH).with_for_update(read=True))
    if current != epoch:
        raise Fenced(f"scheduler epoch {epoch} is over, {current} counts")


def _lock(session: Session, job_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.id == job_id).with_for_update())


def _may_start(session: Session, job: Job, attempt: int) -> bool:
    still_held = session.scalar(select(func.count()).where(Lease.job_id == job.id, Lease.released_at.is_(None)))
    return job.state == JobState.QUEUED and job.wish == Wish.RUN and job.attempt == attempt and not still_held


def _kinds(session: Session, placement: Placement) -> dict[str, str]:
    found = session.execute(select(Node.name, Node.kind).where(Node.name.in_(placement.nodes)))
    return {row.name: row.kind for row in found}


def _granted(placement: Placement, kinds: dict[str, str]) -> dict[str, Any]:
    """What the job object shows as `resource_config.granted`."""
    return {
        "gpu_type": next(iter(kinds.values()), None),
        "num_gpus": placement.slots,
        "num_nodes": len(placement.nodes),
        "nodes": {node: list(slots) for node, slots in placement.nodes.items()},
    }


def _where(placement: Placement) -> str:
    return ", ".join(f"{node} slot {', '.join(map(str, slots))}" for node, slots in sorted(placement.nodes.items()))


def _take_slots(session: Session, job: Job, placement: Placement, kinds: dict[str, str], ttl_s: float) -> None:
    expires_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, ttl_s)
    mine = {"job_id": job.id, "attempt": job.attempt}
    for node, slots in sorted(placement.nodes.items()):  # in one order everywhere: two grants cannot deadlock
        lease = {"node": node, "slots": list(slots), "kind": kinds.get(node, ""), "epoch": job.epoch}
        session.execute(insert(Lease).values(**mine, **lease, tenant_id=job.tenant_id, expires_at=expires_at))
        rows = [{**mine, "node": node, "slot": slot} for slot in sorted(slots)]
        session.execute(insert(LeaseSlot).values(rows))


def _made_progress(session: Session, job: Job) -> bool:
    """Whether the attempt reached a step that none before it had, or made durable what was not."""
    since = select(func.min(Lease.granted_at)).where(Lease.job_id == job.id, Lease.attempt == job.attempt)
    since_s = since.scalar_subquery()
    steps = select(func.count()).where(Step.job_id == job.id, Step.created_at >= since_s)
    before = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id, Checkpoint.attempt < job.attempt)
    reached = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job.id, Checkpoint.attempt == job.attempt)
    last, now = session.scalar(before), session.scalar(reached)
    return bool(session.scalar(steps)) or (now is not None and (last is None or now > last))


def _gave_up(job: Job) -> dict[str, str | None]:
    return {
        "code": "gave_up",
        "message": f"given up after {job.fruitless_attempts} attempts in a row without a new step or checkpoint; "
        f"the last one ended with: {job.reason}",
        "param": None,
        "hint": "Look at the last attempt's logs; when the cause is gone, retry: it goes on from the last checkpoint.",
        "fixable_by": "operator",
    }


def _node_row(node: CoreNode) -> dict[str, Any]:
    return {
        "name": node.name,
        "kind": node.kind,
        "slots": node.slots,
        "memory_gb": node.memory_gb,
        "environments": sorted(node.environments),
        "models": sorted(node.models),
        "seen_at": func.now(),
        "lost_at": None,
    }


def _waiting(jobs: Sequence[Job], leased: set[str]) -> list[CoreJob]:
    """Not those whose last attempt is still leaving: they wait for its release first."""
    return [
        _core(job) for job in jobs if job.state == JobState.QUEUED and job.wish == Wish.RUN and job.id not in leased
    ]


def _core(job: Job) -> CoreJob:
    shape = Shape(**{**job.shape, "kinds": tuple(job.shape.get("kinds", ()))})
    backoff_s = min(2.0**job.fruitless_attempts, MAX_BACKOFF_S) if job.fruitless_attempts else 0.0
    return CoreJob(
        id=job.id,
        tenant=job.tenant_id,
        shape=shape,
        queued_at=job.queued_at.timestamp(),
        priority=Priority(job.priority),
        attempt=job.attempt,
        not_before=job.state_since.timestamp() + backoff_s if backoff_s else 0.0,
    )


def _active(jobs: Sequence[Job], held: dict[tuple[str, int], list[Lease]]) -> list[ActiveJob]:
    by_id = {job.id: job for job in jobs}
    found = [_active_job(by_id[job_id], attempt, leases) for (job_id, attempt), leases in held.items()]
    without = [job for job in jobs if job.state in HELD and (job.id, job.attempt) not in held]
    return found + [_active_job(job, job.attempt, []) for job in without]


def _active_job(job: Job, attempt: int, leases: list[Lease]) -> ActiveJob:
    return ActiveJob(
        id=job.id,
        tenant=job.tenant_id,
        state=JobState(job.state),
        attempt=attempt,
        lease=Placement({lease.node: tuple(lease.slots) for lease in leases}) if leases else None,
        lease_expires_at=min((lease.expires_at.timestamp() for lease in leases), default=0.0),
        progress_at=job.progress_at.timestamp(),
    )
