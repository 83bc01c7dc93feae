"""Which base models nodes are told to copy before a job asks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

from builders_cluster import a_node
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from waiting import until

from cluster.core.job import Node
from cluster.errors import Unavailable
from cluster.ports import SchedulerParts, SchedulerSettings, StagedModel
from cluster.prestage import AT_A_TIME
from cluster.scheduler import Scheduler


class World:
    def __init__(self, *nodes: Node, pool: Executor | None = None) -> None:
        self.clock = ManualClock()
        self.nodes = FakeNodes(*nodes)
        self.models = [StagedModel("base/a", "a" * 64), StagedModel("base/b", "b" * 64)]
        parts = SchedulerParts(
            MemoryStore(self.clock), FakeDrivers(), SchedulerSettings(poll_s=0.05), None, lambda: self.models
        )
        self.scheduler = Scheduler(lambda: parts, self.nodes, self.clock, pool)
        self.scheduler.open()

    def rounds(self) -> None:
        for _ in range(4):
            self.clock.advance(0.1)
            self.scheduler.round()

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
    world.models.append(StagedModel("base/c", "c" * 64))
    world.rounds()
    assert world.missing() == set()


def test_a_node_that_leaves_or_does_not_answer_holds_up_nobody() -> None:
    world = World(a_node("n1"), replace(a_node("n2"), draining=True), a_node("n3"))
    world.rounds()
    assert world.missing() == {("n2", "a"), ("n2", "b")}
    world.nodes.nodes["n4"] = a_node("n4")
    world.nodes.nodes["n3"] = replace(a_node("n3"), models=frozenset())
    stage, world.nodes.stage_model = world.nodes.stage_model, _failing_on("n3", world.nodes)  # type: ignore[method-assign]
    world.rounds()
    assert world.missing() >= {("n3", "a")} and not {("n4", "a"), ("n4", "b")} & world.missing()
    world.nodes.stage_model = stage  # type: ignore[method-assign]
    world.rounds()
    assert world.missing() == {("n2", "a"), ("n2", "b")}


def _failing_on(bad: str, nodes: FakeNodes) -> Callable[[str, str, str], None]:
    stage = nodes.stage_model

    def call(node: str, prefix: str, sha256: str) -> None:
        if node == bad:
            raise Unavailable("its disk is full")
        stage(node, prefix, sha256)

    return call


def test_a_few_copies_at_a_time_leave_threads_for_questions() -> None:
    world = World(*(a_node(f"n{at}") for at in range(9)), pool=ThreadPoolExecutor(32))
    go, under_way, most = threading.Semaphore(0), [0], [0]

    def slow(node: str, prefix: str, sha256: str) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        go.acquire(timeout=30)
        FakeNodes.stage_model(world.nodes, node, prefix, sha256)
        under_way[0] -= 1

    world.nodes.stage_model = slow  # type: ignore[method-assign]

    def looked() -> bool:
        world.clock.advance(0.1)
        world.scheduler.round()
        go.release()
        return world.missing() == set()

    until(looked, 30)
    assert 0 < most[0] <= AT_A_TIME
