"""The virtual clock: jobs come, run and end; a chooser says who runs where, and its word is carried out at once.
It keeps no order of its own, and gives a chooser no duration of a job that has not ended."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.core.job import Node
from cluster.simulation.trace import TraceJob

SPOT_GRACE_S = 120.0
"""Between the notice that a node goes and its going: its jobs write their checkpoints, and lose nothing."""


@dataclass(frozen=True)
class Start:
    """`nodes`: node → how many of its slots."""

    number: int
    nodes: dict[str, int]


@dataclass(frozen=True)
class Stop:
    """It waits again, with what it has done."""

    number: int


Move = Start | Stop


@dataclass(frozen=True)
class NodeChange:
    """A node comes, or is told to go: nothing starts there, and after `SPOT_GRACE_S` its jobs stop."""

    at_s: float
    node: Node
    comes: bool


class Chooser(Protocol):
    """A policy. What it sees of a job before its end: all of `TraceJob` except `duration_s`, unless it says that it is told."""

    def joined(self, node: Node) -> None: ...

    def lost(self, name: str) -> None: ...

    def submitted(self, job: TraceJob) -> None: ...

    def stopped(self, number: int, served_s: float, now: float) -> None:
        """`served_s`: in all its runs, switches left out."""

    def ended(self, number: int, ran_s: float, now: float) -> None:
        """`ran_s`: its duration, which it may learn from now."""

    def choose(self, now: float) -> list[Move]:
        """What to do now. It is asked until nothing is left to do."""

    def next_look(self, now: float) -> float | None:
        """When to ask again if nothing happens before."""


@dataclass(frozen=True)
class Run:
    """One contiguous run, as the referee reads it."""

    number: int
    start_s: float
    end_s: float
    nodes: dict[str, int]


@dataclass
class Running:
    start_s: float
    overhead_s: float
    end_s: float
    nodes: dict[str, int]


@dataclass(frozen=True)
class Scene:
    """What is played: jobs, the changes of nodes, what a resume costs, and until when (None: to the end)."""

    jobs: Sequence[TraceJob]
    changes: Sequence[NodeChange]
    switch_cost_s: float = 30.0
    until_s: float | None = None


@dataclass
class Hooks:
    on_run: Callable[[Run], None] = lambda run: None
    on_progress: Callable[[int, float], None] = lambda done, now: None
    """Jobs that have ended, virtual seconds."""


@dataclass
class Replay:
    scene: Scene
    chooser: Chooser
    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._served: dict[int, float] = {}
        self._running: dict[int, Running] = {}
        self._on_node: dict[str, set[int]] = {}
        self._ends: list[tuple[float, int, float]] = []  # end, job, start: an entry of a run that was stopped is stale
        self._goings: list[tuple[float, str]] = []

    def play(self) -> None:
        arrivals = iter(self.scene.jobs)
        changes = iter(sorted(self.scene.changes, key=lambda change: change.at_s))
        job, change = next(arrivals, None), next(changes, None)
        look: float | None = None
        while self.done < len(self.scene.jobs):
            times = (self._next_end(), self._goings[0][0] if self._goings else math.inf)
            outer = (job.submitted_s if job else math.inf, change.at_s if change else math.inf)
            then = min(*times, *outer, math.inf if look is None else look)
            if then == math.inf or (self.scene.until_s is not None and then > self.scene.until_s):
                break
            self.now = then
            self._end_all()
            while change is not None and change.at_s <= self.now:
                self._change(change)
                change = next(changes, None)
            self._evacuate()
            while job is not None and job.submitted_s <= self.now:
                self.chooser.submitted(job)
                job = next(arrivals, None)
            self._carry_out()
            look = self.chooser.next_look(self.now)
            self.hooks.on_progress(self.done, self.now)
        self._cut()

    def _next_end(self) -> float:
        while self._ends:
            end, number, start = self._ends[0]
            running = self._running.get(number)
            if running is not None and running.start_s == start and running.end_s == end:
                return end
            heapq.heappop(self._ends)
        return math.inf

    def _end_all(self) -> None:
        while self._next_end() <= self.now:
            _, number, _ = heapq.heappop(self._ends)
            self._leave(number)
            self.done += 1
            self.chooser.ended(number, self.scene.jobs[number].duration_s, self.now)

    def _change(self, change: NodeChange) -> None:
        if change.comes:
            self.chooser.joined(change.node)
        else:
            self.chooser.lost(change.node.name)
            heapq.heappush(self._goings, (self.now + SPOT_GRACE_S, change.node.name))

    def _evacuate(self) -> None:
        while self._goings and self._goings[0][0] <= self.now:
            _, name = heapq.heappop(self._goings)
            for number in sorted(self._on_node.get(name, ())):
                self._stop(number)

    def _carry_out(self) -> None:
        moves = self.chooser.choose(self.now)
        while moves:
            for move in moves:
                if isinstance(move, Stop):
                    self._stop(move.number)
                else:
                    self._start(move.number, move.nodes)
            moves = self.chooser.choose(self.now)

    def _start(self, number: int, nodes: dict[str, int]) -> None:
        again = number in self._served
        overhead = self.scene.switch_cost_s if again else 0.0
        left = self.scene.jobs[number].duration_s - self._served.setdefault(number, 0.0)
        end = self.now + overhead + left
        self._running[number] = Running(self.now, overhead, end, nodes)
        for name in nodes:
            self._on_node.setdefault(name, set()).add(number)
        heapq.heappush(self._ends, (end, number, self.now))

    def _stop(self, number: int) -> None:
        running = self._leave(number)
        self._served[number] += max(0.0, self.now - running.start_s - running.overhead_s)
        self.chooser.stopped(number, self._served[number], self.now)

    def _leave(self, number: int, end_s: float | None = None) -> Running:
        running = self._running.pop(number)
        for name in running.nodes:
            self._on_node[name].discard(number)
        self.hooks.on_run(Run(number, running.start_s, self.now if end_s is None else end_s, running.nodes))
        return running

    def _cut(self) -> None:
        """Runs that are open at `until_s` are told as ending just after it."""
        if self.scene.until_s is not None:
            for number in sorted(self._running):
                self._leave(number, math.nextafter(self.scene.until_s, math.inf))


def all_at_once(nodes: Iterable[Node]) -> list[NodeChange]:
    """A cluster that is there from the start and stays."""
    return [NodeChange(0.0, node, True) for node in nodes]
