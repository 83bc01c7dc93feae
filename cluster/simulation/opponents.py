"""The policies that Heliostat is compared with: who goes first, and whether anybody gives way. Replay only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sortedcontainers import SortedList

from cluster.core.job import Node
from cluster.simulation.engine import Move, Start, Stop
from cluster.simulation.packing import Packing
from cluster.simulation.trace import TraceJob

TICK_S = 300.0
LAS_THRESHOLDS = (1 * 3600.0, 10 * 3600.0)
"""GPU-seconds of service after which a job falls into the next queue (Tiresias)."""

Key = tuple[float, float]
Shape = tuple[int, tuple[str, ...]]
"""Slots and kinds."""


@dataclass
class Seen:
    """A job that has not ended. `nodes`: where it runs, since `since`; its resume costs `overhead_s` of that."""

    job: TraceJob
    served_s: float = 0.0
    nodes: dict[str, int] | None = None
    since: float = 0.0
    overhead_s: float = 0.0

    @property
    def shape(self) -> Shape:
        return self.job.slots, self.job.kinds

    def attained_s(self, now: float) -> float:
        running = now - self.since - self.overhead_s if self.nodes is not None else 0.0
        return self.served_s + max(0.0, running)


@dataclass(frozen=True)
class Opponent:
    """`key`: the smaller goes first. `skips`: those behind one that does not fit may start. `slices`: every `TICK_S` all
    places are given anew in the order of the keys."""

    key: Callable[[Seen, float], Key]
    skips: bool = True
    slices: bool = False


def by_age(seen: Seen, now: float) -> Key:
    return seen.job.submitted_s, 0.0


def by_queue(seen: Seen, now: float) -> Key:
    service = seen.attained_s(now) * seen.job.slots
    return sum(service >= threshold for threshold in LAS_THRESHOLDS), seen.job.submitted_s


def by_service(seen: Seen, now: float) -> Key:
    return seen.attained_s(now), seen.job.submitted_s


def by_remaining_time(seen: Seen, now: float) -> Key:
    """Told the durations."""
    return seen.job.duration_s - seen.attained_s(now), seen.job.submitted_s


OPPONENTS = {
    "fifo": Opponent(by_age, skips=False),
    "fifo-skip": Opponent(by_age),
    "las": Opponent(by_queue, slices=True),
    "slice": Opponent(by_service, slices=True),
    "srtf": Opponent(by_remaining_time, slices=True),
}

POLICIES = ("heliostat", *OPPONENTS)


class Repacker:
    """Fills what is free in the order of the opponent; where it slices, gives all places anew at every tick."""

    def __init__(self, opponent: Opponent, slots_per_node: int, switch_cost_s: float) -> None:
        self._opponent = opponent
        self._switch_cost_s = switch_cost_s
        self._packing = Packing(slots_per_node)
        self._running: dict[int, Seen] = {}
        self._waiting: dict[int, Seen] = {}
        self._lines: dict[Shape, SortedList] = {}  # of (key, number)
        self._changed = True
        self._next_tick = TICK_S

    def joined(self, node: Node) -> None:
        self._packing.add(node)
        self._changed = True

    def lost(self, name: str) -> None:
        self._packing.discard(name)

    def submitted(self, job: TraceJob) -> None:
        self._put(Seen(job), job.submitted_s)
        self._changed = True

    def stopped(self, number: int, served_s: float, now: float) -> None:
        seen = self._leave(number)
        seen.served_s, seen.nodes, seen.overhead_s = served_s, None, self._switch_cost_s
        self._put(seen, now)

    def _put(self, seen: Seen, now: float) -> None:
        """Its key stays the same while it waits."""
        if not self._waiting:  # ticks rest while nobody waits
            self._next_tick = max(self._next_tick, math.ceil(now / TICK_S) * TICK_S)
        self._waiting[seen.job.number] = seen
        line = self._lines.setdefault(seen.shape, SortedList())
        line.add((self._opponent.key(seen, now), seen.job.number))

    def ended(self, number: int, ran_s: float, now: float) -> None:
        self._leave(number)

    def _leave(self, number: int) -> Seen:
        seen = self._running.pop(number)
        self._packing.give(seen.nodes or {})
        self._changed = True
        return seen

    def next_look(self, now: float) -> float | None:
        return self._next_tick if self._opponent.slices and self._waiting else None

    def choose(self, now: float) -> list[Move]:
        if self._opponent.slices and self._waiting and now >= self._next_tick:
            self._next_tick = (math.floor(now / TICK_S) + 1) * TICK_S
            stops = self._repacked(now)
            if stops:
                return stops
        if not self._changed:
            return []
        self._changed = False
        return self._filled(now)

    def _filled(self, now: float) -> list[Move]:
        """Of each shape only the first in line need be tried: what does not fit for it fits for none behind it."""
        moves: list[Move] = []
        lines = {shape: line for shape, line in self._lines.items() if line}
        while lines and any(self._packing.free.values()):
            shape = min(lines, key=lambda one: lines[one][0])
            found = self._packing.find(*shape)
            if found is not None:
                moves.append(self._start(self._waiting[lines[shape][0][1]], found, now))
            elif not self._opponent.skips:
                break
            if found is None or not lines[shape]:
                del lines[shape]
        return moves

    def _start(self, seen: Seen, nodes: dict[str, int], now: float) -> Start:
        self._packing.take(nodes)
        del self._waiting[seen.job.number]
        self._lines[seen.shape].remove((self._opponent.key(seen, now), seen.job.number))
        self._running[seen.job.number] = seen
        seen.nodes, seen.since = nodes, now
        return Start(seen.job.number, nodes)

    def _repacked(self, now: float) -> list[Move]:
        """Stops only: what they free is filled in the same order at once, with those who were chosen first in line."""
        packing = self._packing.emptied()
        fresh = [seen for seen in self._running.values() if now - seen.since <= self._switch_cost_s + 60]
        for seen in fresh:
            packing.take(seen.nodes or {})
        young = {seen.job.number for seen in fresh}
        old = [seen for seen in (*self._running.values(), *self._waiting.values()) if seen.job.number not in young]
        stops: list[Move] = []
        hopeless: set[Shape] = set()
        for seen in sorted(old, key=lambda one: self._opponent.key(one, now)):
            if seen.nodes is not None and packing.fits(seen.nodes):
                packing.take(seen.nodes)
                continue
            found = None if seen.shape in hopeless else packing.find(*seen.shape)
            if found is None:
                hopeless.add(seen.shape)
            else:
                packing.take(found)
            if seen.nodes is not None:
                stops.append(Stop(seen.job.number))
        self._changed = True
        return stops
