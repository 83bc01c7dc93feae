"""Which nodes are told of which waiting jobs, and when they are told otherwise."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import pytest
from builders_cluster import a_job, a_node, gang
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from waiting import until

from cluster.core.events import JobQueued, NodeJoined
from cluster.core.job import JobState, Node, Placement
from cluster.core.state import ClusterState
from cluster.errors import Fenced
from cluster.hints import first_in_line
from cluster.ports import Attempt, SchedulerParts, SchedulerSettings
from cluster.scheduler import Scheduler


class World:
    """A scheduler over fakes; what a node is told of a job is their names."""

    def __init__(self, *nodes: Node, ahead: int = 2, pool: Executor | None = None) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.nodes = FakeNodes(*nodes)
        self.gone: dict[str, Exception] = {}
        settings = SchedulerSettings(poll_s=0.05, ahead=ahead)
        parts = SchedulerParts(self.store, FakeDrivers(), settings, self.upcoming)
        self.scheduler = Scheduler(lambda: parts, self.nodes, self.clock, pool)
        self.scheduler.open()

    def upcoming(self, attempt: Attempt, node: Node) -> str:
        if attempt[0] in self.gone:
            raise self.gone[attempt[0]]
        return f"{attempt[0]} on {node.name}"

    def queue(self, *ids: str, **changes: object) -> None:
        for at, id in enumerate(ids):
            self.store.queue(replace(a_job(id, queued_at=float(at)), **changes))  # type: ignore[arg-type]

    def rounds(self) -> None:
        """Until all is said."""
        for _ in range(3):
            self.clock.advance(0.1)
            self.scheduler.round()

    @property
    def expected(self) -> dict[str, list[str]]:
        return {node: [job_id for job_id, _ in keys] for node, keys in self.nodes.expected.items()}


@pytest.fixture
def busy() -> World:
    """One slot, held by j1."""
    made = World(a_node("n1", slots=1))
    made.queue("j1")
    made.rounds()
    return made


def test_who_does_not_have_to_wait_is_named_to_nobody(busy: World) -> None:
    assert (busy.expected, busy.nodes.prepared) == ({"n1": []}, [])


def test_the_first_two_in_line_are_named_once(busy: World) -> None:
    busy.queue("j2", "j3", "j4")
    busy.rounds()
    assert busy.expected == {"n1": ["j2", "j3"]}
    assert busy.nodes.prepared == [("n1", "j2 on n1"), ("n1", "j3 on n1")]
    assert busy.nodes.expected["n1"] == [("j2", 1), ("j3", 1)], "the attempts that they will be"


def test_the_line_is_that_of_all_tenants() -> None:
    state = ClusterState()
    for at, (id, tenant) in enumerate([("a1", "a"), ("a2", "a"), ("b1", "b"), ("a3", "a"), ("b2", "b")]):
        state.apply(JobQueued(a_job(id, queued_at=float(at), tenant=tenant)))
    state.apply(NodeJoined(a_node()))
    state.decide(10.0)
    waiting = state.facts.waiting
    for count in range(7):
        assert first_in_line(waiting, count) == list(waiting.in_order()[:count])


def test_who_is_granted_there_stays_named_until_it_trains_and_the_next_one_follows(busy: World) -> None:
    busy.queue("j2", "j3", "j4")
    busy.rounds()
    busy.store.move("j1", JobState.SUCCEEDED)
    busy.rounds()
    assert busy.store.facts.states["j2"] == JobState.PREPARING
    assert busy.expected == {"n1": ["j2", "j3"]}
    busy.store.move("j2", JobState.RUNNING)
    busy.rounds()
    assert busy.expected == {"n1": ["j3", "j4"]}


def test_who_waits_no_more_is_named_no_more(busy: World) -> None:
    busy.queue("j2")
    busy.rounds()
    busy.store.move("j2", JobState.CANCELLED)
    busy.rounds()
    assert busy.expected == {"n1": []}
    busy.nodes.expected.clear()
    busy.rounds()
    assert busy.expected == {}, "an empty list is told once"


def test_who_is_placed_elsewhere_is_named_there_no_more(busy: World) -> None:
    busy.queue("j2")
    busy.rounds()
    busy.nodes.nodes["n2"] = a_node("n2", slots=1)
    busy.rounds()
    assert busy.store.facts.leases["j2", 1][0] == Placement({"n2": (0,)})
    assert busy.expected == {"n1": []}


@pytest.mark.parametrize("why", [Fenced("job j2 has begun it"), TypeError("a field that no release knows")])
def test_a_job_that_cannot_be_told_of_does_not_hide_the_others(busy: World, why: Exception) -> None:
    busy.gone = {"j2": why}
    busy.queue("j2", "j3")
    busy.rounds()
    assert busy.nodes.prepared == [("n1", "j3 on n1")]


@pytest.mark.parametrize("why", [Fenced("job j2 has begun it"), TypeError("a field that no release knows")])
def test_a_job_that_cannot_be_told_of_is_logged_once(
    busy: World, why: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cluster.hints")
    busy.gone = {"j2": why}
    busy.queue("j2", "j3")
    for _ in range(3):
        busy.rounds()
    [said] = caplog.records
    assert "j2" in said.getMessage() and str(why) in said.getMessage()

    busy.store.move("j2", JobState.CANCELLED)
    busy.rounds()
    assert busy.scheduler._hints._logged == set(), "what waits no more is forgotten"


def test_it_is_named_to_the_node_that_has_most_of_what_it_needs() -> None:
    world = World(a_node("n1", slots=1), replace(a_node("n2", slots=1), models=frozenset({"m"})))
    world.queue("j1", "j2")
    world.rounds()
    world.queue("j3", model="m")
    world.rounds()
    assert world.expected == {"n1": [], "n2": ["j3"]}


def test_answers_that_take_a_while_are_waited_for() -> None:
    with ThreadPoolExecutor(2) as pool:
        world = World(a_node("n1", slots=1), pool=pool)
        world.queue("j1", "j2")
        until(lambda: world.rounds() or world.nodes.prepared == [("n1", "j2 on n1")])
        world.store.move("j2", JobState.CANCELLED)
        until(lambda: world.rounds() or world.nodes.expected == {"n1": []})
        until(lambda: world.rounds() or world.scheduler._hints._named == {})
        world.nodes.expected.clear()
        world.rounds()
        assert world.nodes.expected == {}, "an empty list is told once"


def test_a_gang_larger_than_a_node_is_not_named() -> None:
    world = World(a_node("n1", slots=1), a_node("n2", slots=1))
    world.queue("j1")
    world.rounds()
    world.queue("j2", shape=gang(2, nodes=2))
    world.rounds()
    assert world.expected == {"n1": [], "n2": []}


def test_nothing_is_said_where_it_is_switched_off() -> None:
    world = World(a_node("n1", slots=1), ahead=0)
    world.queue("j1", "j2")
    world.rounds()
    assert (world.store.facts.states["j2"], world.expected) == (JobState.QUEUED, {})
