"""`cluster.ports.SchedulerStore` over PostgreSQL: what the scheduler reads and writes. Every write checks the
scheduler's epoch under a lock, so that a scheduler that was replaced changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.db.listen import JOBS, Listener
from app.db.models import BaseModel, Checkpoint, Control, Job, Lease, LeaseSlot, Node, Step
from app.db.scheduler_rows import one_of, read_rows
from app.db.scheduler_writes import order_many, release_many, start_many
from app.db.session import Database
from app.db.transitions import Change, transition
from cluster.core.events import Grant, Resume, Yield
from cluster.core.job import ACTIVE, JobState, Wish
from cluster.errors import Fenced
from cluster.ports import Attempt, NodeReport, Rows, StagedModel

EPOCH = "scheduler_epoch"
EVERYTHING = "*"
"""In the place of a job's id: shares or nodes changed, look at all."""


_NODES = text(
    """
    INSERT INTO nodes (name, kind, slots, memory_gb, environments, models, park_gb, market, region, price_per_hour,
        notice_deadline, bf16, seen_at, lost_at)
    SELECT name, kind, slots, memory_gb, environments, models, park_gb, market, region, price_per_hour,
        to_timestamp(leaves_at), bf16, now(), NULL
    FROM jsonb_to_recordset(:rows) AS v(name text, kind text, slots int, memory_gb float, environments jsonb, models jsonb,
        park_gb float, market text, region text, price_per_hour float, leaves_at float, bf16 boolean)
    ON CONFLICT (name) DO UPDATE SET kind = excluded.kind, slots = excluded.slots, memory_gb = excluded.memory_gb,
        environments = excluded.environments, models = excluded.models, park_gb = excluded.park_gb,
        market = excluded.market, region = excluded.region, price_per_hour = excluded.price_per_hour,
        notice_deadline = excluded.notice_deadline, bf16 = excluded.bf16, seen_at = excluded.seen_at, lost_at = NULL
    """
).bindparams(bindparam("rows", type_=JSONB))


_CHECKS = text(
    """
    INSERT INTO environment_checks (fingerprint, node, kind, status, detail, checked_at)
    SELECT fingerprint, node, kind, status, detail, to_timestamp(at)
    FROM jsonb_to_recordset(:rows) AS v(fingerprint text, node text, kind text, status text, detail text, at float)
    ON CONFLICT (fingerprint, node, kind) DO UPDATE SET status = excluded.status, detail = excluded.detail,
        checked_at = excluded.checked_at
    WHERE excluded.checked_at > environment_checks.checked_at
    """
).bindparams(bindparam("rows", type_=JSONB))


class SqlSchedulerStore:
    """`max_fruitless_attempts`: so many attempts in a row without a new step or checkpoint, and a job is given up."""

    def __init__(self, database: Database, max_fruitless_attempts: int = 3) -> None:
        self._database = database
        self._checked_at: dict[str, float] = {}  # by node: agents report the same checks again and again
        self._max_fruitless_attempts = max_fruitless_attempts
        self._listener = Listener(database.dsn, JOBS)

    def take_epoch(self) -> int:
        with self._database.platform() as session:
            first = insert(Control).values(name=EPOCH, value=1)
            taken = first.on_conflict_do_update(index_elements=[Control.name], set_={"value": Control.value + 1})
            return session.execute(taken.returning(Control.value)).scalar_one()

    def rows(self, ids: Collection[str] | None = None, shares: bool = True) -> Rows:
        with self._database.snapshot() as session:
            return read_rows(session, ids, shares)

    def base_models(self, names: Sequence[str]) -> list[StagedModel]:
        """Those of the names that are ready; `*`: all that are."""
        found = select(BaseModel).where(BaseModel.status == "ready").order_by(BaseModel.name)
        if "*" not in names:
            found = found.where(BaseModel.name.in_(names))
        with self._database.platform() as session:
            models = session.scalars(found)
            return [StagedModel(one.prefix, one.sha256, one.bytes or 0) for one in models if one.prefix and one.sha256]

    def grant(self, epoch: int, grants: Sequence[Grant], ttl_s: float) -> Mapping[str, int]:
        """One whose slots are held does not keep the others from theirs."""
        try:
            with self._database.platform() as session:
                _check_epoch(session, epoch)
                return start_many(session, epoch, grants, ttl_s)
        except IntegrityError:  # the primary key of lease_slots: somebody holds one of them
            if len(grants) == 1:
                return {}
        return {job: attempt for one in grants for job, attempt in self.grant(epoch, [one], ttl_s).items()}

    def order(self, epoch: int, yields: Sequence[Yield]) -> Collection[Attempt]:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            return order_many(session, yields)

    def resume(self, epoch: int, resumes: Sequence[Resume]) -> Collection[Attempt]:
        done = []
        for one in sorted(resumes, key=lambda resume: resume.job_id):
            try:
                with self._database.platform() as session:
                    _check_epoch(session, epoch)
                    if _resume(session, one):
                        done.append((one.job_id, one.attempt))
            except IntegrityError:
                continue
        return done

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            row = _lock(session, job_id)
            if row is None or row.attempt != attempt or row.state not in ACTIVE:
                return False
            return transition(session, row, Change(JobState.RECOVERING, reason))

    def release(self, epoch: int, attempts: Sequence[Attempt]) -> None:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            for job_id in release_many(session, attempts):
                self._send_on(session, session.get_one(Job, job_id, populate_existing=True))

    def report_nodes(self, epoch: int, reports: Sequence[NodeReport]) -> None:
        with self._database.platform() as session:
            _check_epoch(session, epoch)
            rows = [_node_row(report) for report in sorted(reports, key=lambda report: report.node.name)]
            session.execute(_NODES, {"rows": rows})
            seen = one_of(Node.name, [row["name"] for row in rows])
            session.execute(update(Node).where(Node.lost_at.is_(None), ~seen).values(lost_at=func.now()))
            checks = [{"node": report.node.name, **asdict(check)} for report in reports for check in report.checks]
            if new := [row for row in checks if row["at"] > self._checked_at.get(row["node"], 0.0)]:
                session.execute(_CHECKS, {"rows": new})
        self._checked_at |= {row["node"]: max(one["at"] for one in new if one["node"] == row["node"]) for row in new}

    def wait_for_change(self, timeout_s: float) -> frozenset[str] | None:
        changed = self._listener.wait(timeout_s)
        return None if changed is None or EVERYTHING in changed else frozenset(changed)

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


def _resume(session: Session, resume: Resume) -> bool:
    """Raises IntegrityError when somebody holds one of the slots."""
    job = _lock(session, resume.job_id)
    if job is None or (job.state, job.attempt, job.wish) != (JobState.PARKED, resume.attempt, Wish.RUN):
        return False
    mine = (Lease.job_id == job.id, Lease.attempt == job.attempt, Lease.released_at.is_(None))
    leases = session.scalars(select(Lease).where(*mine).with_for_update()).all()
    if {lease.node for lease in leases} != set(resume.placement.nodes) or any(lease.ordered for lease in leases):
        return False
    for lease in leases:
        lease.slots = list(resume.placement.nodes[lease.node])
        lease.turn += 1
        lease.parked_at, lease.held_since = None, func.clock_timestamp()
        rows = [{"node": lease.node, "slot": slot, "job_id": job.id, "attempt": job.attempt} for slot in lease.slots]
        session.execute(insert(LeaseSlot), rows)
    job.turns += 1
    return transition(session, job, Change(JobState.RUNNING, f"its turn again, number {leases[0].turn}"))


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


def _node_row(report: NodeReport) -> dict[str, Any]:
    node = report.node
    return {
        "name": node.name,
        "kind": node.kind,
        "slots": node.slots,
        "memory_gb": node.memory_gb,
        "environments": sorted(node.environments),
        "models": sorted(node.models),
        "park_gb": node.park_gb,
        "market": node.market,
        "region": node.region,
        "price_per_hour": node.price,
        "leaves_at": report.leaves_at,
        "bf16": report.bf16,
    }
