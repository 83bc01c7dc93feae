"""What tenants may ask of a job in each state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from builders_db import make_job
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import Event, Job
from app.db.session import Database
from app.db.transitions import Change, ask, resume, retry, transition
from cluster.core.job import JobState, Wish
from cluster.errors import Conflict

S = JobState
REFUSED = "refused"


def cancel(session: Session, job: Job) -> None:
    ask(session, job, Wish.CANCEL)


def pause(session: Session, job: Job) -> None:
    ask(session, job, Wish.PAUSE)


TABLE: list[tuple[Callable[[Session, Job], None], JobState, str, str, str]] = [
    # asked, state, wish → state and wish after, or refused
    (cancel, S.QUEUED, "run", "cancelled", "run"),
    (cancel, S.VALIDATING, "run", "cancelled", "run"),
    (cancel, S.PAUSED, "run", "cancelled", "run"),
    (cancel, S.RUNNING, "run", "running", "cancel"),
    (cancel, S.RUNNING, "pause", "running", "cancel"),
    (cancel, S.RUNNING, "cancel", "running", "cancel"),
    (cancel, S.RECOVERING, "run", "recovering", "cancel"),
    (cancel, S.CANCELLED, "run", "cancelled", "run"),
    (cancel, S.ARCHIVING, "run", REFUSED, ""),
    (cancel, S.SUCCEEDED, "run", REFUSED, ""),
    (cancel, S.FAILED, "run", REFUSED, ""),
    (pause, S.QUEUED, "run", "paused", "run"),
    (pause, S.PREPARING, "run", "preparing", "pause"),
    (pause, S.PAUSED, "run", "paused", "run"),
    (pause, S.VALIDATING, "run", REFUSED, ""),
    (pause, S.RUNNING, "cancel", REFUSED, ""),
    (pause, S.SUCCEEDED, "run", REFUSED, ""),
    (resume, S.PAUSED, "run", "queued", "run"),
    (resume, S.RUNNING, "pause", "running", "run"),
    (resume, S.RUNNING, "run", REFUSED, ""),
    (resume, S.QUEUED, "run", REFUSED, ""),
    (retry, S.FAILED, "run", "queued", "run"),
    (retry, S.SUCCEEDED, "run", REFUSED, ""),
    (retry, S.RUNNING, "run", REFUSED, ""),
]


def test_what_tenants_may_ask(database: Database) -> None:
    with database.platform() as session:
        for asked, state, wish, then, then_wish in TABLE:
            job = make_job(session, state=state, wish=wish)
            if then == REFUSED:
                with pytest.raises(Conflict) as caught:
                    asked(session, job)
                assert caught.value.code == "invalid_state" and caught.value.hint
                then, then_wish = state, wish
            else:
                asked(session, job)
            session.flush()
            assert (job.state, job.wish) == (then, then_wish), (asked, state, wish)


def test_retrying_forgets_the_failure(database: Database) -> None:
    with database.platform() as session:
        job = make_job(session, state="preparing", fruitless_attempts=2)
        transition(session, job, Change(S.FAILED, "x", {"code": "c", "message": "why"}))
        session.flush()
        assert job.error is not None and job.finished_at is not None and job.actual is not None
        retry(session, job)
        session.flush()
        assert (job.error, job.finished_at, job.actual, job.fruitless_attempts) == (None, None, None, 0)


def test_a_recovered_job_keeps_its_place_and_a_resumed_one_goes_to_the_end(database: Database) -> None:
    with database.platform() as session:
        recovered, resumed = make_job(session, state="recovering"), make_job(session, state="paused")
        place = recovered.queued_at
        transition(session, recovered, Change(S.QUEUED, "x"))
        resume(session, resumed)
        session.flush()
        assert recovered.queued_at == place < resumed.queued_at


def test_the_event_tells_from_where_to_where_and_why(database: Database) -> None:
    with database.platform() as session:
        job = make_job(session)
        assert transition(session, job, Change(S.PREPARING, "attempt 1"))
        assert not transition(session, job, Change(S.SUCCEEDED, "x"))
        (event,) = session.scalars(select(Event))
        assert (event.seq, event.type) == (1, "state")
        assert event.data == {"from": "queued", "to": "preparing", "reason": "attempt 1"}
