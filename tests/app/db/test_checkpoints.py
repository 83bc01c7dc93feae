"""The last checkpoints of a job stay, the best one, and those that other jobs begin with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders_db import granted_job, queued_job
from sqlalchemy import select

from app.db.job_store import SqlJobStore
from app.db.models import Checkpoint, Job
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database

Commit = Callable[..., list[str]]


@pytest.fixture
def job_id(database: Database) -> str:
    scheduler = SqlSchedulerStore(database)
    return granted_job(database, scheduler, scheduler.take_epoch())


@pytest.fixture
def commit(database: Database, job_id: str) -> Commit:
    """A checkpoint of the step; the prefixes that go."""
    store = SqlJobStore(database)
    return lambda step, **metrics: store.commit_checkpoint(job_id, 1, step, f"ck/{step}", {"w": "0"}, metrics)


def keep(database: Database, job_id: str, count: int) -> None:
    with database.platform() as session:
        job = session.get_one(Job, job_id)
        job.hyperparams = {**job.hyperparams, "n_checkpoints": count}


def steps(database: Database) -> list[int]:
    with database.platform() as session:
        return list(session.scalars(select(Checkpoint.step).order_by(Checkpoint.step)))


def test_all_stay_unless_told_otherwise(database: Database, commit: Commit) -> None:
    assert [commit(step) for step in (1, 2, 3)] == [[], [], []] and steps(database) == [1, 2, 3]


def test_the_last_ones_and_the_best_stay(database: Database, job_id: str, commit: Commit) -> None:
    keep(database, job_id, 2)
    assert [commit(1), commit(2, best_step=1), commit(3, best_step=1)] == [[], [], []]
    assert commit(4, best_step=1) == ["ck/2"] and steps(database) == [1, 3, 4]
    assert sorted(commit(5, best_step=4)) == ["ck/1", "ck/3"] and steps(database) == [4, 5]
    assert commit(6, best_step="no number") == ["ck/4"]


def test_what_another_job_begins_with_stays(database: Database, job_id: str, commit: Commit) -> None:
    keep(database, job_id, 1)
    commit(1)
    with database.platform() as session:
        first = session.scalars(select(Checkpoint.id)).one()
    queued_job(database, parent_checkpoint_id=first)
    assert commit(2) == [] and commit(3) == ["ck/2"] and steps(database) == [1, 3]


def test_one_that_somebody_looks_at_goes_another_time(database: Database, job_id: str, commit: Commit) -> None:
    keep(database, job_id, 1)
    commit(1)
    with database.platform() as looking:
        looking.execute(select(Checkpoint).with_for_update(read=True))
        assert commit(2) == []
    assert sorted(commit(3)) == ["ck/1", "ck/2"]
