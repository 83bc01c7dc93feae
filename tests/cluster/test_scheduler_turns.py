"""Turns, live: orders, parking, going on, giving up; and a scheduler that reads only what changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from builders_cluster import a_job, a_node, gang
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from waiting import PATIENCE_S, until

from cluster.core.events import How
from cluster.core.job import JobState, Priority, TenantShare
from cluster.core.policy import Policy
from cluster.facts import Facts, snapshot_of
from cluster.ports import SchedulerParts, SchedulerSettings
from cluster.scheduler import COUNT_S, Scheduler

S = JobState
POLICY = Policy(quantum_s=20, min_run_s=5, look_s=1, park_max_s=100, urgent_share=1.0)
TIMES = SchedulerSettings(lease_ttl_s=1e6, poll_s=1.0, stage_limit_s=1e6, yield_limit_s=50, policy=POLICY)


class Watched:
    """What operators would see."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, float]] = []
        self.switches: list[tuple[str, str]] = []
        self.counts: dict[tuple[str, str], int] = {}

    def waited(self, tenant: str, seconds: float) -> None:
        self.waits.append((tenant, seconds))

    def switched(self, tenant: str, how: str) -> None:
        self.switches.append((tenant, how))

    def jobs(self, counts: Mapping[tuple[str, str], int]) -> None:
        self.counts = dict(counts)


class World:
    """One node with two cpu slots where jobs can be parked; drivers do what they are told when the test says so."""

    def __init__(self, **node: object) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.drivers = FakeDrivers()
        self.nodes = FakeNodes(replace(a_node("n1", slots=2), park_gb=16.0, **node))  # type: ignore[arg-type]
        self.parts = SchedulerParts(self.store, self.drivers, TIMES)
        self.scheduler = self.another_scheduler()

    def another_scheduler(self) -> Scheduler:
        self.watched = Watched()
        scheduler = Scheduler(lambda: self.parts, self.nodes, self.clock, watch=self.watched)
        scheduler.open()
        return scheduler

    def round(self, times: int = 1) -> None:
        for _ in range(times):
            self.scheduler.round()

    def queue(self, id: str, slots: int = 2, park_gb: float = 1.0, **job: object) -> None:
        shape = replace(gang(slots, "cpu"), park_gb=park_gb)
        self.store.queue(replace(a_job(id, shape, queued_at=self.clock(), tenant=f"of-{id}"), **job))  # type: ignore[arg-type]

    def running(self, id: str = "long", **job: object) -> None:
        self.queue(id, **job)  # type: ignore[arg-type]
        self.round()
        self.store.move(id, S.RUNNING)
        self.round()

    def urgent(self) -> None:
        self.store.facts.tenants["of-urgent"] = TenantShare("of-urgent", urgent_slots=2)
        self.queue("urgent", priority=Priority.URGENT)

    def orders(self) -> dict[str, How]:
        return {job_id: how for (job_id, _), how in self.store.facts.orders.items()}

    def states(self) -> dict[str, JobState]:
        return dict(self.store.facts.states)


@pytest.fixture
def world() -> World:
    return World()


def test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world: World) -> None:
    world.running()
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(3)
    assert world.orders() == {"long": How.PARK}
    assert world.drivers.nudged == [("long", 1)]
    assert world.states()["urgent"] == S.QUEUED
    world.store.park("long")
    world.round(2)
    assert world.states() == {"long": S.PARKED, "urgent": S.PREPARING}
    assert world.drivers.ended == []


def test_a_parked_job_goes_on_in_its_attempt_when_its_slots_are_free(world: World) -> None:
    test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world)
    world.store.move("urgent", S.SUCCEEDED)
    world.round(3)
    assert world.states() == {"long": S.RUNNING, "urgent": S.SUCCEEDED}
    assert world.drivers.started == [("long", 1), ("urgent", 1)]
    assert world.drivers.nudged == [("long", 1), ("long", 1)]


def test_operators_see_waits_switches_and_who_is_where(world: World) -> None:
    test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world)
    world.clock.advance(COUNT_S)
    world.round()
    assert world.watched.waits == [("of-long", 0.0), ("of-urgent", 0.0)]
    assert world.watched.switches == [("of-long", "park")]
    assert world.watched.counts == {("of-long", "parked"): 1, ("of-urgent", "running"): 1}
    world.queue("third")
    world.store.move("urgent", S.SUCCEEDED)
    world.clock.advance(COUNT_S)
    world.round(3)
    assert world.watched.switches == [("of-long", "park"), ("of-long", "resume")]
    assert world.watched.counts[("of-third", "queued")] == 1


def test_where_nothing_can_be_parked_a_job_is_suspended_and_starts_anew_later(world: World) -> None:
    world.running(park_gb=0.0)
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(2)
    assert world.orders() == {"long": How.SUSPEND}
    world.store.move("long", S.SUSPENDED)
    world.round(2)
    assert world.drivers.ended == [("long", 1)]
    assert world.states() == {"long": S.SUSPENDED, "urgent": S.PREPARING}
    world.store.move("urgent", S.SUCCEEDED)
    world.round(3)
    assert world.states()["long"] == S.PREPARING
    assert world.drivers.started[-1] == ("long", 2)


def test_nobody_is_stopped_before_the_least_run(world: World) -> None:
    world.running()
    world.urgent()
    world.clock.advance(POLICY.min_run_s - 1)
    world.round(2)
    assert world.orders() == {}


def test_a_job_that_still_prepares_is_not_stopped_unless_its_node_goes(world: World) -> None:
    world.queue("long")
    world.round(2)
    world.clock.advance(10 * POLICY.quantum_s)
    world.urgent()
    world.round(3)
    assert world.orders() == {}
    world.store.facts.draining = frozenset({"n1"})
    world.round(2)
    assert world.orders() == {"long": How.SUSPEND}


def test_further_rounds_change_nothing_in_any_state_of_a_turn(world: World) -> None:
    world.running()
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(2)
    assert [world.scheduler.round() for _ in range(5)] == [False] * 5
    world.store.park("long")
    world.round(2)
    assert [world.scheduler.round() for _ in range(5)] == [False] * 5
    assert world.drivers.nudged == [("long", 1)]


@pytest.mark.parametrize("moment", ["ordered", "parked"])
def test_a_new_scheduler_goes_on_where_the_last_one_died(world: World, moment: str) -> None:
    world.running()
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(2)
    if moment == "parked":
        world.store.park("long")
    world.scheduler = world.another_scheduler()
    world.round(2)
    if moment == "ordered":
        assert world.orders() == {"long": How.PARK}
        world.store.park("long")
    world.round(2)
    assert world.states() == {"long": S.PARKED, "urgent": S.PREPARING}
    assert world.drivers.nudged == [("long", 1)]


def test_a_job_that_does_not_give_way_is_ended_and_goes_on_later(world: World) -> None:
    world.parts = replace(world.parts, settings=replace(TIMES, lease_ttl_s=1.0))
    world.scheduler = world.another_scheduler()
    world.running()
    world.store.renew("long", 1e6)
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(2)
    world.clock.advance(TIMES.yield_limit_s + 1)
    world.round(1)
    assert world.store.facts.reasons == ["it did not give way in 51 s"]
    world.round(3)
    assert world.drivers.ended == [("long", 1)]
    assert world.states()["urgent"] == S.PREPARING


def test_a_job_that_ends_instead_of_giving_way_is_just_done(world: World) -> None:
    world.running()
    world.clock.advance(POLICY.min_run_s)
    world.urgent()
    world.round(2)
    world.store.move("long", S.SUCCEEDED)
    world.round(3)
    assert world.states() == {"long": S.SUCCEEDED, "urgent": S.PREPARING}
    assert world.store.facts.orders == {}


def test_a_job_parked_too_long_is_told_to_suspend(world: World) -> None:
    test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world)
    world.store.move("urgent", S.RUNNING)
    world.clock.advance(POLICY.park_max_s + 1)
    world.round(2)
    assert world.orders()["long"] is How.SUSPEND


def test_parked_jobs_make_no_progress_and_are_left_in_peace(world: World) -> None:
    world.parts = replace(world.parts, settings=replace(TIMES, stage_limit_s=60))
    world.scheduler = world.another_scheduler()
    test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world)
    world.store.renew("urgent", 1e6)
    world.clock.advance(61)
    world.store.renew("urgent", 1e6)
    world.round(2)
    assert world.store.facts.reasons == []


@pytest.mark.parametrize("who", ["agent", "operator"])
def test_jobs_leave_a_node_that_goes_away_and_nothing_starts_there(world: World, who: str) -> None:
    world.running()
    if who == "agent":
        world.nodes.nodes["n1"] = replace(world.nodes.nodes["n1"], draining=True)
    else:
        world.store.facts.draining = frozenset({"n1"})
    world.queue("other")
    world.round(2)
    assert world.orders() == {"long": How.SUSPEND}
    world.store.move("long", S.SUSPENDED)
    world.round(3)
    assert world.states() == {"long": S.SUSPENDED, "other": S.QUEUED}
    assert world.store.facts.leases == {}
    world.nodes.nodes["n2"] = a_node("n2", slots=2)
    world.round(2)
    assert S.PREPARING in world.states().values()


def test_a_killed_parked_job_is_recovered(world: World) -> None:
    test_an_urgent_job_makes_a_running_one_park_and_takes_its_slots(world)
    world.drivers.living.discard(("long", 1))
    world.round()
    world.clock.advance(1)
    world.round(3)
    assert world.store.facts.reasons == ["its driver is gone"]
    assert world.states()["long"] == S.QUEUED
    assert ("long", 1) not in world.store.facts.leases


# Reading what changed -----------------------------------------------------------------------------------------------


def test_a_round_reads_only_what_changed_and_a_poll_also_what_is_active(world: World) -> None:
    world.running()
    world.queue("next")
    world.store.looks.clear()
    world.scheduler.round(frozenset({"next"}))
    assert world.store.looks == [frozenset({"next"})]
    world.clock.advance(TIMES.poll_s)
    world.scheduler.round(frozenset())
    assert world.store.looks[-1] == frozenset({"long"})


def test_what_was_read_piece_by_piece_equals_one_whole_look(world: World) -> None:
    facts = Facts()
    seen: set[str] = set()
    for id, then in [("a", S.QUEUED), ("b", S.QUEUED), ("a", S.RUNNING), ("a", S.PARKED), ("b", S.CANCELLED)]:
        if then is S.QUEUED:
            world.queue(id, slots=1)
        elif then is S.RUNNING:
            world.round(2)
            world.store.move(id, then)
        elif then is S.PARKED:
            world.store.park(id)
        else:
            world.store.move(id, then)
        seen.add(id)
        facts.take(world.store.rows({id}), {id})
    facts.take(world.store.rows(seen), seen)
    facts.see(world.nodes.reports())
    whole = snapshot_of(world.store.rows(), world.nodes.nodes.values())
    assert facts._snapshot(seen) == replace(whole, nodes={}, tenants={})
    assert facts.nodes == whole.nodes


def test_a_refused_grant_is_looked_at_again_but_not_in_a_hurry(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.queue("long")
    monkeypatch.setattr(world.store, "grant", lambda *given: {})
    world.round()
    assert world.scheduler._wait_for_poll
    assert world.scheduler._inbox.take() is None


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop() -> Iterator[Callable[[Scheduler], None]]:
    started: list[tuple[Scheduler, threading.Thread]] = []

    def run(scheduler: Scheduler) -> None:
        started.append((scheduler, threading.Thread(target=scheduler.run)))
        started[-1][1].start()

    yield run
    for scheduler, thread in started:
        scheduler.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_slow_nodes_hold_nobody_up(loop: Callable[[Scheduler], None]) -> None:
    """The end of one job waits for its node; a job that comes meanwhile is granted at once."""
    world = World()
    hold = threading.Event()
    answer = world.nodes.end_attempt

    def slow(node: str, job_id: str, attempt: int) -> bool | None:
        hold.wait(PATIENCE_S)
        return answer(node, job_id, attempt)

    world.nodes.end_attempt = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        scheduler = Scheduler(lambda: world.parts, world.nodes, world.clock, pool)
        loop(scheduler)
        world.queue("one", slots=1)
        until(lambda: world.states()["one"] is S.PREPARING)
        world.store.move("one", S.CANCELLED)
        world.queue("two", slots=1)
        until(lambda: world.states()["two"] is S.PREPARING)
        assert ("one", 1) in world.store.facts.leases
        hold.set()
        until(lambda: ("one", 1) not in world.store.facts.leases)
        scheduler.stop()


def test_time_alone_wakes_the_loop_when_a_turn_is_over(world: World) -> None:
    world.running()
    world.urgent()
    world.round(2)
    assert world.orders() == {}
    assert 0 < world.scheduler._quiet_s() <= POLICY.min_run_s
