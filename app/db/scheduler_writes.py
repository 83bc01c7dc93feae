"""What the scheduler writes for many jobs at once: one statement for all grants, all orders, all releases of a round. The caller
holds the epoch. A row of `jobs` is locked before any of its leases, and rows in the order of their ids: no two writers
deadlock."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import Integer, String, bindparam, column, func, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from app.db.events import NewEvent
from app.db.ids import EVENT, new_id
from app.db.models import Lease, Node
from app.db.scheduler_rows import one_of
from app.db.usage import turn_closed
from cluster.core.events import Grant, Yield
from cluster.core.job import ACTIVE, JobState, Placement, Wish
from cluster.ports import Attempt

_ROWS = bindparam("rows", type_=JSONB)

_LOCK = text("SELECT id, tenant_id, state, wish, attempt FROM jobs WHERE id = ANY(:ids) ORDER BY id FOR UPDATE")

_START = text(
    """
    UPDATE jobs SET state = 'preparing', reason = v.reason, attempt = jobs.attempt + 1, epoch = :epoch, granted = v.granted,
        turns = turns + 1, state_since = clock_timestamp(), progress_at = clock_timestamp()
    FROM jsonb_to_recordset(:rows) AS v(id text, reason text, granted jsonb) WHERE jobs.id = v.id
    """
).bindparams(_ROWS)

_LEASES = text(
    """
    INSERT INTO leases (job_id, attempt, tenant_id, node, slots, kind, price_per_hour, epoch, expires_at)
    SELECT v.*, :epoch, clock_timestamp() + make_interval(secs => :ttl_s)
    FROM jsonb_to_recordset(:rows)
        AS v(job_id text, attempt int, tenant_id text, node text, slots int[], kind text, price_per_hour float)
    ORDER BY node, job_id
    """
).bindparams(_ROWS)

_SLOTS = text(
    """
    INSERT INTO lease_slots (node, slot, job_id, attempt)
    SELECT node, slot, job_id, attempt
    FROM jsonb_to_recordset(:rows) AS v(job_id text, attempt int, node text, slots int[]), unnest(v.slots) AS slot
    ORDER BY node, slot
    """
).bindparams(_ROWS)

_FREE = text(
    """
    DELETE FROM lease_slots USING jsonb_to_recordset(:rows) AS v(job_id text, attempt int)
    WHERE lease_slots.job_id = v.job_id AND lease_slots.attempt = v.attempt
    """
).bindparams(_ROWS)

_EVENTS = text(
    """
    INSERT INTO events (job_id, seq, id, tenant_id, type, level, message, data, attempt)
    SELECT * FROM jsonb_to_recordset(:rows) AS v(job_id text, seq bigint, id text, tenant_id text, type text, level text,
        message text, data jsonb, attempt int)
    """
).bindparams(_ROWS)

_ORDER = text(
    """
    UPDATE leases SET ordered = v.how, order_reason = v.reason, ordered_at = coalesce(ordered_at, clock_timestamp())
    FROM jsonb_to_recordset(:rows) AS v(job_id text, attempt int, how text, reason text)
    WHERE leases.job_id = v.job_id AND leases.attempt = v.attempt AND released_at IS NULL
        AND CASE v.how WHEN 'suspend' THEN ordered IS DISTINCT FROM 'suspend' ELSE ordered IS NULL AND parked_at IS NULL END
    RETURNING leases.job_id, leases.attempt
    """
).bindparams(_ROWS)

_ATTAINED = text(
    """
    UPDATE jobs SET attained_s = held.seconds
    FROM (SELECT job_id, sum(turn_s) AS seconds
          FROM (SELECT job_id, max(held_s) AS turn_s FROM leases WHERE job_id = ANY(:ids) GROUP BY job_id, attempt) AS attempts
          GROUP BY job_id) AS held
    WHERE jobs.id = held.job_id
    """
)

_NUMBERS = text(
    "UPDATE jobs SET last_seq = last_seq + 1 WHERE id = ANY(:ids) RETURNING id, last_seq, tenant_id, attempt"
)


def start_many(session: Session, epoch: int, grants: Sequence[Grant], ttl_s: float) -> dict[str, int]:
    """Job → its new attempt, for those that still wait. Raises IntegrityError when a slot is held: then nothing is done."""
    by_id = {grant.job.id: grant for grant in grants}
    locked = session.execute(_LOCK, {"ids": list(by_id)}).all()
    leaving = set(
        session.scalars(select(Lease.job_id).where(one_of(Lease.job_id, by_id), Lease.released_at.is_(None)).distinct())
    )
    able = {job.id: job for job in locked if job.id not in leaving and _may_start(job, by_id[job.id].job.attempt)}
    if not able:
        return {}
    _write_starts(session, epoch, able, {job_id: by_id[job_id].placement for job_id in able}, ttl_s)
    return {job.id: job.attempt + 1 for job in able.values()}


def _write_starts(
    session: Session, epoch: int, jobs: Mapping[str, Any], where: Mapping[str, Placement], ttl_s: float
) -> None:
    nodes = _nodes(session, {node for placement in where.values() for node in placement.nodes})
    reasons = {job_id: _started(job.attempt + 1, where[job_id]) for job_id, job in jobs.items()}
    rows = [{"id": job_id, "reason": reasons[job_id], "granted": _granted(where[job_id], nodes)} for job_id in jobs]
    session.execute(_START, {"rows": rows, "epoch": epoch})
    leases = [
        {"job_id": job.id, "attempt": job.attempt + 1, "tenant_id": job.tenant_id, **part}
        for job in jobs.values()
        for part in _parts(where[job.id], nodes)
    ]
    session.execute(_LEASES, {"rows": leases, "epoch": epoch, "ttl_s": ttl_s})
    session.execute(_SLOTS, {"rows": leases})
    append_many(session, {job.id: _moved(job.state, JobState.PREPARING, reasons[job.id]) for job in jobs.values()})


def order_many(session: Session, yields: Sequence[Yield]) -> set[Attempt]:
    """Those that an order was written for; one that stands is left alone."""
    locked = session.execute(_LOCK, {"ids": sorted({one.job_id for one in yields})}).all()
    present = {(job.id, job.attempt) for job in locked if job.state in ACTIVE}
    wanted = {(one.job_id, one.attempt): one for one in yields if (one.job_id, one.attempt) in present}
    rows = [
        {"job_id": job_id, "attempt": attempt, "how": str(one.how), "reason": one.reason}
        for (job_id, attempt), one in wanted.items()
    ]
    ordered = {(job_id, attempt) for job_id, attempt in session.execute(_ORDER, {"rows": rows})}
    append_many(session, {key[0]: _told(wanted[key]) for key in ordered})
    return ordered


def release_many(session: Session, attempts: Sequence[Attempt]) -> list[str]:
    """Closes the leases; the jobs that are recovering, of these attempts, in their rows' locks."""
    ids = sorted({job_id for job_id, _ in attempts})
    locked = session.execute(_LOCK, {"ids": ids}).all()
    rows = [{"job_id": job_id, "attempt": attempt} for job_id, attempt in attempts]
    session.execute(_FREE, {"rows": rows})
    recordset = func.jsonb_to_recordset(bindparam(None, rows, type_=JSONB))
    these = recordset.table_valued(column("job_id", String), column("attempt", Integer)).render_derived(with_types=True)
    closed = (
        update(Lease)
        .where(tuple_(Lease.job_id, Lease.attempt).in_(select(these.c.job_id, these.c.attempt)))
        .where(Lease.released_at.is_(None))
        .values(**turn_closed(), released_at=func.clock_timestamp(), ordered=None, ordered_at=None, parked_at=None)
    )
    session.execute(closed.execution_options(synchronize_session=False))
    count_attained(session, ids)
    present = set(attempts)
    return [job.id for job in locked if job.state == JobState.RECOVERING and (job.id, job.attempt) in present]


def count_attained(session: Session, ids: Sequence[str]) -> None:
    """From their leases: a turn that ends is counted once, however often this is asked."""
    session.execute(_ATTAINED, {"ids": list(ids)})


def append_many(session: Session, events: Mapping[str, NewEvent]) -> None:
    """As `append_event`, one for each job."""
    if not events:
        return
    rows = []
    for job_id, seq, tenant, attempt in session.execute(_NUMBERS, {"ids": list(events)}):
        event = events[job_id]
        rows.append(
            {
                "job_id": job_id,
                "seq": seq,
                "id": new_id(EVENT),
                "tenant_id": tenant,
                "type": event.type,
                "level": event.level,
                "message": event.message,
                "data": event.data,
                "attempt": attempt,
            }
        )
    session.execute(_EVENTS, {"rows": rows})


def _may_start(job: Any, attempt: int) -> bool:
    return job.state in (JobState.QUEUED, JobState.SUSPENDED) and job.wish == Wish.RUN and job.attempt == attempt


def _nodes(session: Session, names: Collection[str]) -> dict[str, dict[str, Any]]:
    found = session.execute(select(Node.name, Node.kind, Node.price_per_hour).where(one_of(Node.name, names)))
    return {name: {"kind": kind, "price_per_hour": price} for name, kind, price in found}


def _parts(placement: Placement, nodes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    unknown = {"kind": "", "price_per_hour": 0.0}
    return [{"node": node, "slots": list(slots), **nodes.get(node, unknown)} for node, slots in placement.nodes.items()]


def _granted(placement: Placement, nodes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the job object shows as `resource_config.granted`."""
    kinds = [nodes[node]["kind"] for node in placement.nodes if node in nodes]
    return {
        "gpu_type": next(iter(kinds), None),
        "num_gpus": placement.slots,
        "num_nodes": len(placement.nodes),
        "nodes": {node: list(slots) for node, slots in placement.nodes.items()},
    }


def _started(attempt: int, placement: Placement) -> str:
    where = sorted(placement.nodes.items())
    return f"attempt {attempt} on " + ", ".join(f"{node} slot {', '.join(map(str, slots))}" for node, slots in where)


def _moved(was: str, then: JobState, reason: str) -> NewEvent:
    return NewEvent("state", f"{then}: {reason}", data={"from": was, "to": then, "reason": reason})


def _told(one: Yield) -> NewEvent:
    return NewEvent("turn", f"told to {one.how}: {one.reason}", data={"how": str(one.how), "reason": one.reason})
