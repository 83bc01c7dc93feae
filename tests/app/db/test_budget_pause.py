"""What a driver learns of budget and quota from the rows, and what becomes of a job that has used them up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from builders_db import granted_job
from sqlalchemy import func, update

from app.db.job_store import SqlJobStore
from app.db.models import Job, Lease, Tenant
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database
from app.db.transitions import ask, resume
from cluster.core.job import JobState as S
from cluster.core.job import Wish

SPENT: dict[str, str | None] = {"code": "budget_reached", "message": "spent", "hint": "more", "param": "budget"}


@pytest.fixture
def scheduler(database: Database) -> Iterator[SqlSchedulerStore]:
    store = SqlSchedulerStore(database)
    yield store
    store.close()


@pytest.fixture
def running(database: Database, scheduler: SqlSchedulerStore) -> str:
    job_id = granted_job(database, scheduler, scheduler.take_epoch())
    assert SqlJobStore(database).move(job_id, 1, S.RUNNING, reason="training")
    return job_id


def job(database: Database, job_id: str) -> Job:
    with database.platform() as session:
        return session.get_one(Job, job_id)


def test_the_allowance_is_that_of_the_attempt(database: Database, running: str) -> None:
    store = SqlJobStore(database)
    assert store.allowance(running, 1) is None
    with database.platform() as session:
        session.execute(update(Job).values(budget={"gpu_hours": 1.0}))
        an_hour_ago = func.now() - func.make_interval(0, 0, 0, 0, 1)
        session.execute(update(Lease).values(granted_at=an_hour_ago, held_since=an_hour_ago))
    found = store.allowance(running, 1)
    assert found is not None and found.code == "budget_reached" and -60 < found.left_s <= 0
    assert store.allowance(running, 2) is None, "another attempt's budget is not ours to keep"


def test_quotas_of_the_month_reach_the_driver(database: Database, running: str) -> None:
    with database.platform() as session:
        session.execute(update(Tenant).values(gpu_hours_per_month=0.0))
    found = SqlJobStore(database).allowance(running, 1)
    assert found is not None and found.code == "quota_exceeded" and found.left_s <= 0


def test_a_budget_asks_nobody(database: Database, running: str) -> None:
    """A pause that nobody asked for is no pause that was taken back."""
    assert SqlJobStore(database).move(running, 1, S.PAUSED, reason="budget_reached: 1 GPU-hours", error=SPENT)
    paused = job(database, running)
    assert (paused.state, paused.wish, paused.error) == ("paused", "run", SPENT)
    with database.platform() as session:
        resume(session, session.get_one(Job, running, with_for_update=True))
    resumed = job(database, running)
    assert (resumed.state, resumed.error) == ("queued", None)


@pytest.mark.parametrize(("wish", "state"), [(Wish.CANCEL, "cancelled"), (Wish.PAUSE, "paused")])
def test_what_the_tenant_asks_for_meanwhile(database: Database, running: str, wish: Wish, state: str) -> None:
    with database.platform() as session:
        ask(session, session.get_one(Job, running, with_for_update=True), wish)
    assert SqlJobStore(database).move(running, 1, S.PAUSED, reason="budget_reached: 1 GPU-hours", error=SPENT)
    assert job(database, running).state == state
