from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from builders_cluster import a_job, a_node, gang
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from waiting import PATIENCE_S, until

from cluster.core.job import JobState
from cluster.errors import Conflict, Fenced, Unavailable
from cluster.ports import SchedulerParts, SchedulerSettings
from cluster.scheduler import Scheduler

S = JobState
TIMES = SchedulerSettings(lease_ttl_s=30, margin_s=10, poll_s=0.05, stage_limit_s=900, driver_gone_s=1)


class World:
    """A scheduler over fakes, one round at a time, all on one clock."""

    def __init__(self, *nodes: object) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.drivers = FakeDrivers()
        self.nodes = FakeNodes(a_node("n1", slots=2), a_node("n2", slots=2))
        self.scheduler = self.another_scheduler()

    def another_scheduler(self) -> Scheduler:
        parts = SchedulerParts(self.store, self.drivers, TIMES)
        scheduler = Scheduler(lambda: parts, self.nodes, self.clock)
        scheduler.open()
        return scheduler

    def round(self, times: int = 1) -> None:
        for _ in range(times):
            self.scheduler.round()

    def settle(self) -> None:
        """Past the time in which nothing counts as overdue, with the leases of all jobs renewed."""
        self.clock.advance(TIMES.lease_ttl_s)
        for job_id, attempt in self.store.facts.leases:
            if (job_id, attempt) in self.drivers.living:
                self.store.renew(job_id, TIMES.lease_ttl_s)

    def running(self, job_id: str = "j1", **job: object) -> None:
        self.store.queue(a_job(job_id))
        self.round()
        self.store.move(job_id, S.RUNNING)
        self.settle()

    def state(self, job_id: str = "j1") -> JobState:
        return self.store.facts.states[job_id]


@pytest.fixture
def world() -> World:
    return World()


def test_a_queued_job_is_granted_and_its_driver_started(world: World) -> None:
    world.store.queue(a_job("j1", gang(2)))
    world.round()
    assert world.state() == S.PREPARING
    assert world.drivers.started == [("j1", 1)]
    assert world.store.facts.leases["j1", 1][0].nodes == {"n1": (0, 1)}
    assert world.store.facts.nodes == ["n1", "n2"]


def test_further_rounds_change_nothing(world: World) -> None:
    world.running()
    assert [world.scheduler.round() for _ in range(5)] == [False] * 5
    assert (world.state(), world.drivers.started, world.drivers.ended) == (S.RUNNING, [("j1", 1)], [])


def test_no_node_no_grant_and_no_grant_to_a_silent_node(world: World) -> None:
    world.nodes.silent = {"n1", "n2"}
    world.store.queue(a_job())
    world.round()
    assert world.state() == S.QUEUED
    world.nodes.silent = {"n1"}
    world.round()
    assert list(world.store.facts.leases["j1", 1][0].nodes) == ["n2"]


def test_a_job_cancelled_before_its_grant_is_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.store.queue(a_job())
    grant = world.store.grant

    def cancelled_just_before(*given: object) -> int | None:
        world.store.move("j1", S.CANCELLED)
        return grant(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(world.store, "grant", cancelled_just_before)
    world.round(2)
    assert (world.state(), world.drivers.started) == (S.CANCELLED, [])


# Drivers ----------------------------------------------------------------------------------------------------------


def test_a_dead_driver_counts_after_two_looks_a_second_apart(world: World) -> None:
    world.running()
    world.drivers.living.clear()
    world.round(3)
    assert world.state() == S.RUNNING
    world.clock.advance(1.0)
    world.round()
    assert world.store.facts.reasons == ["its driver is gone"]


def test_a_driver_found_again_is_not_dead(world: World) -> None:
    world.running()
    world.drivers.living.clear()
    world.round()
    world.clock.advance(0.9)
    world.drivers.living.add(("j1", 1))
    world.round()
    world.drivers.living.clear()
    world.clock.advance(0.9)
    world.round()
    assert world.state() == S.RUNNING


def test_a_driver_that_is_slow_to_answer_is_not_dead(world: World) -> None:
    world.running()
    world.drivers.slow.add(("j1", 1))
    for _ in range(5):
        world.clock.advance(5)
        world.round()
    assert world.state() == S.RUNNING


def test_after_a_fault_the_attempt_is_ended_released_and_queued_again_and_a_new_one_starts(world: World) -> None:
    world.running()
    world.drivers.living.clear()
    world.round()
    world.clock.advance(1.0)
    world.round(3)
    assert world.drivers.ended == [("j1", 1)]
    assert ("n1", "j1", 1) in world.nodes.asked
    assert (world.state(), world.drivers.started) == (S.PREPARING, [("j1", 1), ("j1", 2)])
    assert list(world.store.facts.leases) == [("j1", 2)]


def test_a_driver_that_was_never_started_is_started_by_the_next_scheduler(world: World) -> None:
    world.store.queue(a_job())
    world.drivers.refuse["j1"] = Unavailable("Ray is away")
    world.round()
    assert (world.state(), world.drivers.started) == (S.PREPARING, [])
    world.drivers.refuse.clear()
    world.nodes.running["n1"] = {("j1", 1)}  # left behind by a driver that died with the scheduler
    world.scheduler = world.another_scheduler()
    world.round()
    assert world.drivers.started == [("j1", 1)]
    assert world.nodes.running["n1"] == set()
    world.round(3)
    assert (world.state(), world.drivers.started) == (S.PREPARING, [("j1", 1)])


def test_a_driver_is_not_started_beside_living_processes_of_its_attempt(world: World) -> None:
    world.store.queue(a_job())
    world.drivers.refuse["j1"] = Unavailable("Ray is away")
    world.round()
    world.drivers.refuse.clear()
    world.nodes.immortal.add(("j1", 1))
    world.round(2)
    assert world.drivers.started == []


def test_the_next_scheduler_adopts_drivers_that_are_there(world: World) -> None:
    world.store.queue(a_job())
    world.round()
    world.scheduler = world.another_scheduler()
    world.round(2)
    assert (world.drivers.started, world.drivers.ended) == ([("j1", 1)], [])
    world.drivers.living.clear()
    world.round()
    world.clock.advance(1)
    world.round()
    assert world.store.facts.reasons == ["its driver is gone"]


# Leases and progress ----------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_renewed_ends_the_attempt(world: World) -> None:
    world.running()
    world.clock.advance(TIMES.lease_ttl_s + TIMES.margin_s)
    world.round()
    assert world.state() == S.RUNNING
    world.clock.advance(0.1)
    world.round()
    assert world.store.facts.reasons == ["its lease was not renewed in time"]


def test_no_progress_for_the_stages_limit_ends_the_attempt(world: World) -> None:
    world.running()
    world.store.renew("j1", 10_000)
    world.clock.advance(TIMES.stage_limit_s)
    world.round()
    assert world.state() == S.RUNNING
    world.clock.advance(1)
    world.round()
    assert world.store.facts.reasons == ["no progress for 901 s"]


def test_after_an_outage_of_the_database_drivers_get_time_to_renew(world: World) -> None:
    world.running()
    stop = _run(world.scheduler)
    world.store.down = Unavailable("the database is down")
    until(lambda: world.scheduler.state().get("problem") == "the database is down")
    world.clock.advance(5_000)
    world.store.down = None
    until(lambda: world.scheduler.state().get("problem") is None)
    stop()
    assert world.state() == S.RUNNING
    world.settle()
    world.round()
    assert world.state() == S.RUNNING


def test_without_a_sign_after_the_outage_the_attempt_ends(world: World) -> None:
    world.running()
    world.clock.advance(5_000)
    world.scheduler = world.another_scheduler()
    world.round()
    assert world.state() == S.RUNNING
    world.clock.advance(TIMES.lease_ttl_s)
    world.round()
    assert world.store.facts.reasons == ["its lease was not renewed in time"]


def test_after_a_sleep_of_the_machine_drivers_get_time_to_renew(world: World) -> None:
    """The clock on the wall, which the database reads, has gone on; nothing else has."""
    world.running()
    world.round()
    world.store.clock = lambda: world.clock() + 3600
    world.round()
    assert world.state() == S.RUNNING
    world.clock.advance(TIMES.lease_ttl_s)
    world.round()
    assert world.store.facts.reasons == ["its lease was not renewed in time"]


# Ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [S.SUCCEEDED, S.FAILED, S.CANCELLED, S.PAUSED])
def test_the_lease_of_a_job_that_ended_is_released(world: World, end: JobState) -> None:
    world.running()
    world.store.move("j1", end)
    world.round()
    assert (world.state(), world.store.facts.leases) == (end, {})
    assert world.drivers.ended == [("j1", 1)]


def test_slots_are_not_free_while_a_process_lives_even_after_the_lease_expired(world: World) -> None:
    world.running()
    world.nodes.immortal.add(("j1", 1))
    world.store.move("j1", S.CANCELLED)
    world.clock.advance(10_000)
    world.round(3)
    assert list(world.store.facts.leases) == [("j1", 1)]
    world.nodes.immortal.clear()
    world.clock.advance(TIMES.poll_s)
    world.round()
    assert world.store.facts.leases == {}


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_on_an_unreachable_node_slots_are_free_only_after_the_lease_and_a_margin(world: World, how: str) -> None:
    world.running()
    world.store.move("j1", S.RECOVERING)
    if how == "silent":
        world.nodes.silent = {"n1"}
    else:
        del world.nodes.nodes["n1"]
    world.clock.advance(TIMES.lease_ttl_s + TIMES.margin_s)
    world.round(2)
    assert list(world.store.facts.leases) == [("j1", 1)]
    world.clock.advance(0.1)
    world.round(2)
    assert list(world.store.facts.leases) == [("j1", 2)]
    assert list(world.store.facts.leases["j1", 2][0].nodes) == ["n2"]


def test_stray_processes_are_ended(world: World) -> None:
    world.running()
    world.nodes.running = {"n1": {("j1", 1), ("j0", 7)}, "n2": {("j1", 0)}}
    world.round()
    assert world.nodes.running == {"n1": {("j1", 1)}, "n2": set()}


def test_one_broken_job_does_not_stop_the_others(world: World) -> None:
    world.store.queue(a_job("j1"))
    world.drivers.refuse["j1"] = Conflict("its driver cannot be made")
    world.store.queue(a_job("j2", queued_at=1))
    world.round()
    assert world.state("j2") == S.PREPARING
    assert world.drivers.started == [("j2", 1)]


# Who rules --------------------------------------------------------------------------------------------------------


def test_an_older_scheduler_is_fenced(world: World) -> None:
    world.another_scheduler()
    world.store.queue(a_job())
    with pytest.raises(Fenced):
        world.round()
    assert world.state() == S.QUEUED


def test_the_loop_opens_grants_and_stops(world: World) -> None:
    parts = SchedulerParts(world.store, world.drivers, TIMES)
    scheduler = Scheduler(lambda: parts, world.nodes, world.clock)
    assert (scheduler.ping(), scheduler.state()) == (0, {"epoch": 0, "problem": None})
    world.store.queue(a_job("j1", gang(2)))
    world.store.queue(a_job("j2", gang(3), queued_at=1))
    stop = _run(scheduler)
    until(lambda: world.drivers.started == [("j1", 1)])
    until(lambda: scheduler.state()["running"] == {"j1/1": {"n1": (0, 1)}})
    stop()
    assert scheduler.ping() == 2
    assert scheduler.state()["waiting"] == {"j2": ["gang_too_large"]}


def test_the_loop_waits_for_a_database_that_is_not_there_yet(world: World) -> None:
    parts = SchedulerParts(world.store, world.drivers, TIMES)
    scheduler = Scheduler(lambda: parts, world.nodes, world.clock)
    world.store.down = Unavailable("the database is starting")
    stop = _run(scheduler)
    until(lambda: scheduler.state()["problem"] == "the database is starting")
    world.store.down = None
    until(lambda: scheduler.ping() == 2)
    stop()
    assert scheduler.state()["problem"] is None


def _run(scheduler: Scheduler) -> Callable[[], None]:
    thread = threading.Thread(target=scheduler.run)
    thread.start()

    def stop() -> None:
        scheduler.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()

    return stop
