"""Event numbers and the tenant's tail."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from builders_db import queued_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.events import NewEvent, TailCursor, append_event, events_of_job, tail_end, tail_of_tenant
from app.db.models import Event
from app.db.session import Database
from cluster.errors import InvalidRequest, NotFound

LOG = NewEvent("log", "a line")


def _read_on(session: Session, after: TailCursor) -> tuple[list[Event], TailCursor]:
    events = list(tail_of_tenant(session, "acme", after))
    return events, TailCursor.of(events[-1]) if events else after


@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=5, max_size=40))
def test_numbers_have_no_gaps_whoever_writes_and_fails(database: Database, plan: list[tuple[int, bool]]) -> None:
    jobs = [queued_job(database), queued_job(database)]

    def write(which: int, fails: bool) -> None:
        with database.platform() as session:
            append_event(session, jobs[which], LOG)
            if fails:
                session.rollback()

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(write, *step) for step in plan]:
            future.result()
    with database.platform() as session:
        for which, job in enumerate(jobs):
            written = sum(1 for target, fails in plan if target == which and not fails)
            assert [event.seq for event in events_of_job(session, job)] == list(range(1, written + 1))


def test_a_transaction_held_open_makes_no_subscriber_miss_or_reorder(database: Database) -> None:
    early, late = queued_job(database), queued_job(database)
    seen: list[Event] = []
    with database.platform() as reader, database.platform() as holding:
        cursor = tail_end(reader)
        append_event(holding, early, LOG)  # the lower transaction number, committed last
        with database.platform() as quick:
            append_event(quick, late, LOG)
        events, cursor = _read_on(reader, cursor)
        seen += events
        assert events == []  # the quick one is withheld: what is still open comes before it
        holding.commit()
        events, cursor = _read_on(reader, cursor)
        seen += events
        assert [event.job_id for event in seen] == [early, late]
        assert _read_on(reader, cursor) == ([], cursor)


def test_a_subscriber_that_reads_while_many_write_gets_each_event_once_and_in_order(database: Database) -> None:
    jobs = [queued_job(database) for _ in range(4)]

    def write(job: str) -> None:
        for _ in range(15):
            with database.platform() as session:
                append_event(session, job, LOG)

    seen: list[tuple[str, int]] = []
    cursor = TailCursor()
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, job) for job in jobs]
        while len(seen) < 60:
            done = all(writer.done() for writer in writers)
            with database.tenant("acme") as session:
                events, cursor = _read_on(session, cursor)
            seen += [(event.job_id, event.seq) for event in events]
            assert events or not done, "all have written, and some event is missing"
    assert len(set(seen)) == 60
    for job in jobs:
        assert [seq for job_id, seq in seen if job_id == job] == list(range(1, 16))


def test_the_tail_can_be_resumed_from_an_event_s_id(database: Database) -> None:
    job = queued_job(database)
    with database.platform() as session:
        append_event(session, job, LOG)
        append_event(session, job, LOG)
    with database.platform() as session:
        first, second = tail_of_tenant(session, "acme", TailCursor())
        after_first = TailCursor.parse(str(TailCursor.of(first)))
        assert tail_of_tenant(session, "acme", after_first) == [second]
        assert tail_of_tenant(session, "rival", TailCursor()) == []


@pytest.mark.parametrize("text", ["", "x", "1:2", "-1:0:job", "1:²:job", "9" * 30 + ":0:j"])
def test_a_strange_cursor_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        TailCursor.parse(text)


def test_no_event_without_a_job(database: Database) -> None:
    with pytest.raises(NotFound), database.platform() as session:
        append_event(session, "ftjob-none", LOG)
    with database.platform() as session:
        assert session.scalars(select(Event)).all() == []
