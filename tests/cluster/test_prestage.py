"""Which base models nodes are told to copy before a job asks for them."""

from __future__ import annotations

import threading
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import pytest
from builders_cluster import a_node
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from waiting import PATIENCE_S, until

from cluster.core.job import Node
from cluster.errors import Unavailable
from cluster.ports import SchedulerParts, SchedulerSettings, StagedModel
from cluster.prestage import AT_A_TIME, RETRY_S
from cluster.scheduler import Scheduler


def a_model(letter: str) -> StagedModel:
    return StagedModel(f"base/{letter}", letter * 64, 1000)


class World:
    def __init__(self, *nodes: Node, pool: Executor | None = None) -> None:
        self.clock = ManualClock()
        self.nodes = FakeNodes(*nodes)
        self.models = [a_model("a"), a_model("b")]
        parts = SchedulerParts(
            MemoryStore(self.clock), FakeDrivers(), SchedulerSettings(poll_s=0.05), None, lambda: self.models
        )
        self.scheduler = Scheduler(lambda: parts, self.nodes, self.clock, pool)
        self.scheduler.open()

    def rounds(self) -> None:
        """After each of them all that was asked is answered, however slow the threads are."""
        for _ in range(12):
            self.clock.advance(0.1)
            self.scheduler.round()
            until(lambda: all(answer.done() for answer in self.scheduler._asking._open.values()))

    def missing(self) -> set[tuple[str, str]]:
        nodes = self.nodes.nodes.values()
        return {
            (node.name, model.sha256[0]) for node in nodes for model in self.models if model.sha256 not in node.models
        }


def test_every_node_gets_every_model_also_one_that_joins_later() -> None:
    world = World(a_node("n1"), a_node("n2"))
    world.rounds()
    assert world.missing() == set()
    world.nodes.nodes["n3"] = a_node("n3")
    world.models.append(a_model("c"))
    world.rounds()
    assert world.missing() == set()


@pytest.mark.parametrize("threads", [0, 8])
def test_a_node_that_leaves_or_fails_holds_up_nobody_and_is_not_asked_at_every_look(
    threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ThreadPoolExecutor(threads) if threads else None
    world = World(a_node("n1"), replace(a_node("n2"), draining=True), a_node("n3"), pool=pool)
    world.rounds()
    assert world.missing() == {("n2", "a"), ("n2", "b")}
    world.nodes.nodes["n4"] = a_node("n4")
    world.nodes.nodes["n3"] = replace(a_node("n3"), models=frozenset())
    tries: list[str] = []

    def fail_on_n3(node: str, model: StagedModel) -> None:
        tries.append(node)
        if node == "n3":
            raise Unavailable("its disk is full")
        FakeNodes.stage_ahead(world.nodes, node, model)

    world.nodes.stage_ahead = fail_on_n3  # type: ignore[method-assign]
    with caplog.at_level("WARNING"):
        world.rounds()
        world.rounds()
    assert world.missing() == {("n2", "a"), ("n2", "b"), ("n3", "a"), ("n3", "b")}
    assert tries.count("n3") == 2 and caplog.text.count("its disk is full") == 2, "once for each model, and it is said"
    del world.nodes.stage_ahead
    world.clock.advance(RETRY_S)
    world.rounds()
    assert world.missing() == {("n2", "a"), ("n2", "b")}


def test_a_few_copies_at_a_time_leave_threads_for_questions() -> None:
    world = World(*(a_node(f"n{at}") for at in range(9)), pool=ThreadPoolExecutor(32))
    go, under_way, most = threading.Semaphore(0), [0], [0]

    def slow(node: str, model: StagedModel) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        go.acquire(timeout=PATIENCE_S)
        FakeNodes.stage_ahead(world.nodes, node, model)
        under_way[0] -= 1

    world.nodes.stage_ahead = slow  # type: ignore[method-assign]

    def looked() -> bool:
        world.clock.advance(0.1)
        world.scheduler.round()
        go.release()
        return world.missing() == set()

    until(looked)
    assert 0 < most[0] <= AT_A_TIME
