"""What a node is told of a job that waits is what its next attempt will be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from builders_db import grant, make_node, queued_job

from app.db.job_store import SqlJobStore
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database
from cluster.core.job import Node, Placement
from cluster.errors import Fenced

NODE = Node("n1", "cpu", slots=2, memory_gb=4.0)


def test_it_is_the_next_attempt_on_all_of_the_node(database: Database) -> None:
    scheduler, store = SqlSchedulerStore(database), SqlJobStore(database)
    with database.platform() as session:
        make_node(session)
    job_id = queued_job(database)
    upcoming = store.upcoming(job_id, 1, NODE)
    assert (upcoming.attempt, upcoming.placement, upcoming.kind) == (1, Placement({"n1": (0, 1)}), "cpu")
    assert grant(scheduler, scheduler.take_epoch(), job_id, Placement({"n1": (0,)}))
    granted = store.assignment(job_id, 1)
    assert replace(upcoming, placement=granted.placement, kind=granted.kind) == granted


@pytest.mark.parametrize(
    ("attempt", "fields"), [(2, {}), (0, {}), (1, {"state": "paused"}), (1, {"state": "preparing"})]
)
def test_what_is_not_the_next_attempt_of_one_that_waits_is_refused(
    database: Database, attempt: int, fields: dict[str, Any]
) -> None:
    """A node would throw away the files of the attempt that lives."""
    job_id = queued_job(database, **fields)
    with pytest.raises(Fenced):
        SqlJobStore(database).upcoming(job_id, attempt, NODE)


def test_a_job_that_is_gone_is_refused(database: Database) -> None:
    with pytest.raises(Fenced):
        SqlJobStore(database).upcoming("ftjob-never", 1, NODE)
