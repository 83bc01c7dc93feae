"""Time that is counted: what is held, what is billed, what a month and a budget have left."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from builders_db import make_job, make_tenant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, null, select, update
from sqlalchemy.orm import Session

from app.db.models import Job, Lease, Tenant
from app.db.session import Database
from app.db.transitions import Change, transition
from app.db.usage import (
    allowance,
    billed_s,
    budget_spent,
    held_s,
    month_gpu_hours,
    spent_by,
    tenants_out_of_hours,
    turn_closed,
)
from cluster.core.job import JobState as S

HOUR = timedelta(hours=1)
MONTH = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def ago(time: timedelta = timedelta(0)) -> datetime:
    return datetime.now(UTC) - time


def lease(session: Session, job: Job, attempt: int = 1, **fields: Any) -> Lease:
    """Of one slot, closed an hour after its grant unless told otherwise."""
    granted = fields.pop("granted_at", ago(HOUR))
    row: dict[str, Any] = {"node": "n1", "slots": [0], "kind": "cpu", "epoch": 1, "held_since": null()}
    row |= {"granted_at": granted, "released_at": granted + HOUR, "held_s": 3600.0, "expires_at": ago()}
    made = Lease(job_id=job.id, attempt=attempt, tenant_id=job.tenant_id, **{**row, **fields})
    session.add(made)
    session.flush()
    return made


def open_lease(session: Session, job: Job, since: timedelta = HOUR, **fields: Any) -> Lease:
    began = ago(since)
    return lease(
        session, job, **{"granted_at": began, "released_at": None, "held_since": began, "held_s": 0.0, **fields}
    )


def test_a_parked_lease_costs_nothing(database: Database) -> None:
    with database.platform() as session:
        job = make_job(session)
        open_lease(session, job, held_since=null(), held_s=1800.0)
        assert spent_by(session, job.id).gpu_hours == pytest.approx(0.5)


def test_slots_and_prices_multiply(database: Database) -> None:
    with database.platform() as session:
        job = make_job(session)
        lease(session, job, slots=[0, 1, 2], price_per_hour=2.0)
        lease(session, job, attempt=2, price_per_hour=5.0)
        spent = spent_by(session, job.id)
        assert (spent.gpu_hours, spent.usd) == (pytest.approx(4.0), pytest.approx(11.0))


def test_giving_way_is_not_billed(database: Database) -> None:
    """From the order on the tenant pays nothing, though the slots are held until the checkpoint is written."""
    with database.platform() as session:
        job = make_job(session)
        open_lease(session, job, ordered="suspend", ordered_at=ago(HOUR / 4))
        assert spent_by(session, job.id).gpu_hours == pytest.approx(0.75, abs=0.01)
        session.execute(update(Lease).values(**turn_closed(), released_at=func.clock_timestamp()))
        assert spent_by(session, job.id).gpu_hours == pytest.approx(0.75, abs=0.01)
        held, billed = session.execute(select(held_s(), billed_s())).one()
        assert (held, billed) == (pytest.approx(3600, abs=30), pytest.approx(2700, abs=30))


@pytest.mark.parametrize(("moved", "hours"), [(True, 0.0), (False, 1.0)])
def test_coming_back_after_a_switch_is_not_billed(database: Database, moved: bool, hours: float) -> None:
    with database.platform() as session:
        job = make_job(session, state="preparing", attempt=1, moved=moved)
        open_lease(session, job)
        assert transition(session, job, Change(S.RUNNING, "training"))
        assert spent_by(session, job.id).gpu_hours == pytest.approx(hours, abs=0.01)
        session.refresh(job)
        assert job.moved is False


@pytest.mark.parametrize(("then", "moved"), [(S.SUSPENDED, True), (S.RECOVERING, True), (S.PAUSED, False)])
def test_whose_doing_the_next_start_is(database: Database, then: S, moved: bool) -> None:
    with database.platform() as session:
        job = make_job(session, state="running")
        assert transition(session, job, Change(then, "x"))
        assert job.moved is moved


def test_a_pause_by_a_limit_keeps_its_reason_until_it_goes_on(database: Database) -> None:
    error: dict[str, str | None] = {"code": "budget_reached", "message": "spent", "hint": "more"}
    with database.platform() as session:
        job = make_job(session, state="running")
        transition(session, job, Change(S.PAUSED, "budget_reached", error))
        assert job.error == error


def test_a_month_s_share_of_a_lease_that_began_before_it(database: Database) -> None:
    with database.platform() as session:
        job = make_job(session)
        lease(session, job, granted_at=MONTH - HOUR, released_at=MONTH + HOUR, held_s=7200.0)
        lease(session, job, attempt=2, granted_at=MONTH - 3 * HOUR, released_at=MONTH - HOUR, held_s=7200.0)
        assert month_gpu_hours(session, ["acme", "nobody"]) == {"acme": pytest.approx(1.0), "nobody": 0.0}


def test_who_is_out_of_hours(database: Database) -> None:
    with database.platform() as session:
        make_tenant(session, "zero").gpu_hours_per_month = 0.0
        make_job(session, "zero", state="suspended")
        for tenant, quota, state in (
            ("none", None, "queued"),
            ("enough", 1.5, "queued"),
            ("out", 1.0, "queued"),
            ("nothing-waits", 1.0, "running"),
        ):
            make_tenant(session, tenant).gpu_hours_per_month = quota
            lease(session, make_job(session, tenant, state=state), granted_at=max(MONTH, ago(HOUR)))
        assert tenants_out_of_hours(session) == {"out", "zero"}


@pytest.mark.parametrize(
    ("budget", "price", "left_s"),
    [
        (None, 0.0, None),
        ({"gpu_hours": 4.0}, 0.0, 3600.0),
        ({"gpu_hours": 1.0}, 0.0, -1800.0),
        ({"usd": 8.0}, 2.0, 3600.0),
        ({"usd": 8.0}, 0.0, None),
        ({"gpu_hours": 4.0, "usd": 5.0}, 2.0, 900.0),
    ],
)
def test_what_a_budget_leaves(
    database: Database, budget: dict[str, float] | None, price: float, left_s: float | None
) -> None:
    """Two slots, held for an hour."""
    with database.platform() as session:
        job = make_job(session, state="running", attempt=1, budget=budget)
        open_lease(session, job, slots=[0, 1], price_per_hour=price)
        found = allowance(session, job)
        assert (found.left_s if found else None) == (pytest.approx(left_s, abs=60) if left_s is not None else None)
        assert (budget_spent(session, job) is not None) == (left_s is not None and left_s < 0)


def test_jobs_of_a_tenant_use_its_month_together(database: Database) -> None:
    with database.platform() as session:
        make_tenant(session).gpu_hours_per_month = month_hours = 10.0
        began = {"granted_at": MONTH, "held_since": ago(), "held_s": 0.0}
        jobs = [make_job(session, state="running", attempt=1) for _ in range(3)]
        for slot, job in enumerate(jobs):
            open_lease(session, job, slots=[slot], **began)
        lease(session, make_job(session), node="n2", granted_at=MONTH, released_at=ago(), held_s=4 * 3600.0)
        found = allowance(session, jobs[0])
        assert found is not None and found.code == "quota_exceeded"
        assert found.left_s == pytest.approx((month_hours - 4) * 3600 / 3, abs=60)


LEASES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.floats(-40, 10),  # granted, hours from the beginning of the month
        st.floats(0.01, 60),  # hours long
        st.floats(0, 1),  # of them held
        st.floats(0, 1),  # of what was held: unbilled
        st.integers(1, 8),
    ),
    max_size=8,
)


@settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # it clears its rows itself
@given(LEASES)
def test_nothing_is_lost_or_counted_twice(
    database: Database, leases: list[tuple[str, float, float, float, float, int]]
) -> None:
    """What jobs have spent is the sum over their leases; a month has its share of each, however tenants are asked for."""
    expected, month = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    with database.platform() as session:
        for table in (Lease, Job):
            session.execute(delete(table))
        jobs = {tenant: make_job(session, tenant) for tenant in expected}
        for attempt, (tenant, begin, length, held, unbilled, slots) in enumerate(leases, start=1):
            granted = MONTH + begin * HOUR
            hours = length * held * (1 - unbilled) * slots
            times = {"held_s": length * held * 3600, "unbilled_s": length * held * unbilled * 3600}
            ends = {"granted_at": granted, "released_at": granted + length * HOUR, "slots": list(range(slots))}
            lease(session, jobs[tenant], attempt, **ends, **times)
            expected[tenant] += hours
            month[tenant] += hours * max(0.0, min(1.0, (begin + length) / length))
        for tenant, job in jobs.items():
            assert spent_by(session, job.id).gpu_hours == pytest.approx(expected[tenant], abs=1e-6)
            assert month_gpu_hours(session, [tenant])[tenant] == pytest.approx(month[tenant], abs=1e-5)
        assert month_gpu_hours(session, ["a", "b"]) == pytest.approx(month, abs=1e-5)
        assert session.scalar(select(func.count()).select_from(Tenant)) == 2
