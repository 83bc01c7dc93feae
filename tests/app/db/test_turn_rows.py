"""Turns in the rows: orders, parking, resuming; each meets whatever state the job is in, and nothing is counted twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from builders_db import core_job, grant, granted_job, make_node, queued_job
from sqlalchemy import func, select, text, update

from app.db.job_store import SqlJobStore
from app.db.models import Event, Job, Lease, LeaseSlot
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database
from app.db.transitions import ask
from cluster.core.events import Grant, How, Resume, Yield
from cluster.core.job import JobState, Placement, Wish
from cluster.errors import Fenced

S = JobState
HERE, BESIDE = Placement({"n1": (0,)}), Placement({"n1": (1,)})


class Rows:
    """A running job that holds slot 0 of n1, and what may be done to it."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.scheduler = SqlSchedulerStore(database)
        self.jobs = SqlJobStore(database)
        self.epoch = self.scheduler.take_epoch()
        with database.platform() as session:
            make_node(session, "n1", price_per_hour=2.0)
        self.id = granted_job(database, self.scheduler, self.epoch)
        self.jobs.move(self.id, 1, S.RUNNING, reason="training")

    def order(self, how: How = How.PARK, reason: str = "its quantum is over") -> set[tuple[str, int]]:
        return set(self.scheduler.order(self.epoch, [Yield(self.id, 1, how, reason)]))

    def parked(self) -> None:
        assert self.order() == {(self.id, 1)}
        assert self.jobs.park(self.id, 1)

    def resume(self, placement: Placement = HERE) -> bool:
        return bool(self.scheduler.resume(self.epoch, [Resume(self.id, 1, placement)]))

    def held_for(self, seconds: float) -> None:
        """As if this turn had begun so long ago."""
        with self.database.platform() as session:
            before = func.clock_timestamp() - text(f"interval '{seconds} seconds'")
            session.execute(update(Lease).values(held_since=before))

    def job(self) -> Job:
        with self.database.platform() as session:
            return session.get_one(Job, self.id)

    def lease(self) -> Lease:
        with self.database.platform() as session:
            return session.scalars(select(Lease).where(Lease.job_id == self.id)).one()

    def slots(self) -> set[tuple[str, int]]:
        with self.database.platform() as session:
            return {(row.node, row.slot) for row in session.scalars(select(LeaseSlot))}

    def wish(self, wish: Wish) -> None:
        with self.database.platform() as session:
            ask(session, session.get_one(Job, self.id), wish)


@pytest.fixture
def rows(database: Database) -> Rows:
    return Rows(database)


def test_an_order_reaches_the_driver_and_stands_until_it_is_obeyed(rows: Rows) -> None:
    assert rows.order() == {(rows.id, 1)}
    assert rows.order() == set(), "once is enough"
    for _ in range(2):
        assert rows.jobs.heartbeat(rows.id, 1, 30).order is How.PARK
    (active,) = rows.scheduler.rows().active
    assert (active.order, active.parked) == (How.PARK, False)
    assert rows.scheduler.rows().now - active.ordered_at < 10


def test_an_order_to_suspend_takes_the_place_of_one_to_park_and_not_the_other_way_round(rows: Rows) -> None:
    rows.order(How.PARK)
    assert rows.order(How.SUSPEND) == {(rows.id, 1)}
    assert rows.order(How.PARK) == set()
    assert rows.jobs.heartbeat(rows.id, 1, 30).order is How.SUSPEND


def test_the_tenant_is_told_why(rows: Rows) -> None:
    rows.order(reason="an urgent job waits")
    with rows.database.platform() as session:
        told = session.scalars(select(Event).where(Event.type == "turn")).one()
    assert (told.message, told.data["how"]) == ("told to park: an urgent job waits", "park")


@pytest.mark.parametrize("attempt", [0, 2])
def test_an_order_for_another_attempt_is_no_order(rows: Rows, attempt: int) -> None:
    assert rows.scheduler.order(rows.epoch, [Yield(rows.id, attempt, How.PARK, "")]) == set()
    assert rows.jobs.heartbeat(rows.id, 1, 30).order is None


def test_parking_frees_the_slots_and_keeps_the_lease(rows: Rows) -> None:
    rows.parked()
    assert (rows.job().state, rows.job().reason, rows.slots()) == (S.PARKED, "its quantum is over", set())
    beat = rows.jobs.heartbeat(rows.id, 1, 30)
    assert (beat.fenced, beat.parked, beat.order) == (False, True, None)
    (active,) = rows.scheduler.rows().active
    assert (active.parked, active.lease) == (True, HERE)
    other = queued_job(rows.database)
    assert grant(rows.scheduler, rows.epoch, other, HERE) == 1


def test_parking_twice_is_parking_once_and_counts_once(rows: Rows) -> None:
    rows.held_for(100)
    rows.parked()
    attained = rows.job().attained_s
    assert 100 <= attained < 130
    assert rows.jobs.park(rows.id, 1)
    assert rows.job().attained_s == attained


def test_without_an_order_nothing_is_parked(rows: Rows) -> None:
    assert not rows.jobs.park(rows.id, 1)
    rows.order(How.SUSPEND)
    assert not rows.jobs.park(rows.id, 1)
    assert (rows.job().state, rows.slots()) == (S.RUNNING, {("n1", 0)})


def test_a_job_that_is_being_archived_is_not_parked(rows: Rows) -> None:
    rows.order()
    rows.jobs.move(rows.id, 1, S.ARCHIVING, reason="")
    assert not rows.jobs.park(rows.id, 1)
    assert rows.slots() == {("n1", 0)}


def test_resuming_takes_the_slots_in_the_next_turn(rows: Rows) -> None:
    rows.parked()
    assert rows.resume(BESIDE)
    assert (rows.job().state, rows.job().turns, rows.slots()) == (S.RUNNING, 2, {("n1", 1)})
    lease = rows.lease()
    assert (lease.turn, lease.parked_at, lease.slots) == (2, None, [1])
    assert not rows.jobs.heartbeat(rows.id, 1, 30).parked
    assert not rows.resume(BESIDE), "it is not parked any more"


def test_slots_that_somebody_took_meanwhile_are_not_resumed_on(rows: Rows) -> None:
    rows.parked()
    assert grant(rows.scheduler, rows.epoch, queued_job(rows.database), HERE) == 1
    assert not rows.resume()
    assert (rows.job().state, rows.slots()) == (S.PARKED, {("n1", 0)})


@pytest.mark.parametrize("why", ["other node", "told to suspend", "wants a pause", "recovering"])
def test_what_may_not_be_resumed(rows: Rows, why: str) -> None:
    rows.parked()
    if why == "told to suspend":
        rows.order(How.SUSPEND)
    elif why == "wants a pause":
        rows.wish(Wish.PAUSE)
    elif why == "recovering":
        rows.scheduler.mark_recovering(rows.epoch, rows.id, 1, "its driver is gone")
    assert not rows.resume(Placement({"n2": (0,)}) if why == "other node" else HERE)
    assert rows.slots() == set()


def test_a_parked_job_that_is_lost_goes_back_to_the_queue(rows: Rows) -> None:
    rows.parked()
    assert rows.scheduler.mark_recovering(rows.epoch, rows.id, 1, "its driver is gone")
    (active,) = rows.scheduler.rows().active
    assert active.parked
    rows.scheduler.release(rows.epoch, [(rows.id, 1)])
    assert [job.id for job in rows.scheduler.rows().waiting] == [rows.id]


def test_a_suspended_job_waits_from_then_on_and_remembers_what_it_had(rows: Rows) -> None:
    rows.held_for(50)
    rows.order(How.SUSPEND, "lent slots are wanted back")
    rows.jobs.move(rows.id, 1, S.SUSPENDED, reason="gave way to others")
    assert rows.job().reason == "lent slots are wanted back"
    assert rows.scheduler.rows().waiting == [], "its processes may still live"
    rows.scheduler.release(rows.epoch, [(rows.id, 1)])
    (job,) = rows.scheduler.rows().waiting
    assert job.attained_s >= 50
    assert job.submitted_at is not None and job.queued_at > job.submitted_at
    assert grant(rows.scheduler, rows.epoch, rows.id, HERE, attempt=1) == 2
    assert rows.job().turns == 2


@pytest.mark.parametrize(("wish", "then"), [(Wish.PAUSE, S.PAUSED), (Wish.CANCEL, S.CANCELLED)])
def test_a_wish_that_came_while_it_gave_way_is_granted(rows: Rows, wish: Wish, then: JobState) -> None:
    rows.order(How.SUSPEND)
    rows.wish(wish)
    rows.jobs.move(rows.id, 1, S.SUSPENDED, reason="gave way to others")
    assert rows.job().state == then


@pytest.mark.parametrize("wish", [Wish.PAUSE, Wish.CANCEL])
def test_a_suspended_job_obeys_its_tenant_at_once(rows: Rows, wish: Wish) -> None:
    rows.order(How.SUSPEND)
    rows.jobs.move(rows.id, 1, S.SUSPENDED, reason="")
    rows.wish(wish)
    assert rows.job().state == (S.PAUSED if wish is Wish.PAUSE else S.CANCELLED)
    rows.scheduler.release(rows.epoch, [(rows.id, 1)])
    assert rows.scheduler.rows().waiting == []


def test_seconds_parked_are_neither_attained_nor_billed(rows: Rows) -> None:
    rows.held_for(3600)
    rows.parked()
    with rows.database.platform() as session:
        session.execute(update(Lease).values(parked_at=func.clock_timestamp() - text("interval '10 hours'")))
    assert rows.resume()
    rows.held_for(3600)
    rows.jobs.move(rows.id, 1, S.CANCELLED, reason="")
    rows.scheduler.release(rows.epoch, [(rows.id, 1)])
    job = rows.job()
    assert 7200 <= job.attained_s < 7230
    assert job.actual is not None and 1.99 < job.actual["gpu_hours"] < 2.02
    assert 3.98 < job.actual["usd"] < 4.04


def test_a_released_attempt_takes_no_more_orders(rows: Rows) -> None:
    rows.order()
    rows.jobs.move(rows.id, 1, S.CANCELLED, reason="")
    rows.scheduler.release(rows.epoch, [(rows.id, 1)])
    assert rows.order() == set()
    with pytest.raises(Fenced):
        rows.jobs.park(rows.id, 1)


def test_many_are_granted_in_one_go_and_one_that_cannot_be_spoils_nothing(rows: Rows) -> None:

    jobs = [core_job(queued_job(rows.database)) for _ in range(4)]
    places = [Placement({"n2": (slot,)}) for slot in range(3)] + [HERE]
    granted = rows.scheduler.grant(
        rows.epoch, [Grant(job, at, job.shape) for job, at in zip(jobs, places, strict=True)], 30.0
    )
    assert granted == {job.id: 1 for job in jobs[:3]}
    assert rows.slots() == {("n1", 0), ("n2", 0), ("n2", 1), ("n2", 2)}
    rows.scheduler.release(rows.epoch, [(job.id, 1) for job in jobs[:2]])
    assert rows.slots() == {("n1", 0), ("n2", 2)}
    with rows.database.platform() as session:
        numbers = session.execute(select(Event.job_id, func.max(Event.seq), func.count()).group_by(Event.job_id)).all()
    assert all(last == count for _, last, count in numbers), "no event number is missing"


def test_one_look_at_some_jobs_sees_what_a_look_at_all_sees(rows: Rows) -> None:
    waiting = queued_job(rows.database)
    everything = rows.scheduler.rows()
    some = rows.scheduler.rows({waiting, rows.id, "ftjob-none"}, shares=False)
    assert (list(some.waiting), list(some.active)) == (list(everything.waiting), list(everything.active))
    assert some.shares is None and everything.shares is not None
    assert rows.scheduler.rows({waiting}).active == []


def test_orders_parking_and_resuming_at_the_same_time_never_hold_a_slot_twice(rows: Rows) -> None:
    """A second job takes the slot whenever it can; whoever holds it, the rows agree with the leases."""
    other = queued_job(rows.database)

    def turns(_: int) -> None:
        rows.order()
        rows.jobs.park(rows.id, 1)
        rows.resume()

    def takes(_: int) -> None:
        with rows.database.platform() as session:
            attempt = session.get_one(Job, other).attempt
        if grant(rows.scheduler, rows.epoch, other, HERE, attempt) is not None:
            rows.scheduler.mark_recovering(rows.epoch, other, attempt + 1, "x")
            rows.scheduler.release(rows.epoch, [(other, attempt + 1)])
            with rows.database.platform() as session:
                session.get_one(Job, other).fruitless_attempts = 0

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(turns, range(12)))
        list(pool.map(takes, range(12)))
    rows.resume()
    assert rows.job().state == S.RUNNING
    assert rows.slots() == {("n1", 0)}
