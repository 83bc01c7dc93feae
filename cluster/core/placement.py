"""Nodes that are alike, in a pool, with an index of what is free: where a gang fits best. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from cluster.core.job import Job, Node, Placement, Shape
from cluster.core.kinds import memory_gb

MANY = 64
"""A model that more nodes have than this is looked for among the fitting nodes, not the other way round."""

Slots = dict[str, int]
"""Node name → slots, as bits."""


def bits(slots: Iterable[int]) -> int:
    return sum(1 << slot for slot in slots)


def slots_of(mask: int) -> tuple[int, ...]:
    return tuple(slot for slot in range(mask.bit_length()) if mask >> slot & 1)


def lowest(mask: int, count: int) -> int:
    """The `count` lowest bits that are set."""
    taken = 0
    for _ in range(count):
        bit = mask & -mask
        taken, mask = taken | bit, mask ^ bit
    return taken


def masks(placement: Placement) -> Slots:
    return {node: bits(slots) for node, slots in placement.nodes.items()}


def placement_of(taken: Slots) -> Placement:
    return Placement({node: slots_of(mask) for node, mask in sorted(taken.items())})


@dataclass(frozen=True, order=True)
class PoolKey:
    """`rated`: memory of the kind, not as reported: nodes of one kind differ by a few MiB, which must not decide."""

    rated: float
    price: float
    kind: str
    slots: int
    memory: int
    region: str
    market: str


def pool_key(node: Node) -> PoolKey:
    rated = memory_gb(node.kind) or 0.0
    return PoolKey(rated, node.price, node.kind, node.slots, round(node.memory_gb), node.region, node.market)


class Pool:
    """Of each node two counts are kept: slots that are free, and slots that are free or coming free (`soon`)."""

    def __init__(self, key: PoolKey) -> None:
        self.key = key
        self.size = key.slots
        self.nodes: dict[str, Node] = {}
        self.memory_gb = 0.0
        self._slots: tuple[Slots, Slots] = ({}, {})
        self._names: list[str] | None = None  # in order; None: to be sorted again
        self._at: dict[str, int] = {}
        self._by_count: tuple[list[int], list[int]] = ([], [])  # for each count, which of the names, as bits
        self._most = [0, 0]
        self.gains = 0
        """Goes up whenever more slots could be had."""
        self._with_model: dict[str, set[str]] = {}
        self._with_environment: dict[str, set[str]] = {}

    # Nodes --------------------------------------------------------------------------------------------------------

    def add(self, node: Node) -> None:
        self.memory_gb = min(self.memory_gb, node.memory_gb) if self.nodes else node.memory_gb
        self.nodes[node.name] = node
        for slots in self._slots:
            slots[node.name] = 0
        self._names = None
        self._cache(node, True)

    def discard(self, name: str) -> None:
        node = self.nodes.pop(name)
        self.memory_gb = min((one.memory_gb for one in self.nodes.values()), default=0.0)
        for slots in self._slots:
            del slots[name]
        self._names = None
        self._cache(node, False)

    def _cache(self, node: Node, there: bool) -> None:
        for index, items in ((self._with_model, node.models), (self._with_environment, node.environments)):
            for item in items:
                names = index.setdefault(item, set())
                names.add(node.name) if there else names.discard(node.name)
                if not names:
                    del index[item]

    def update(self, name: str, free: int, soon: int) -> None:
        """`soon` contains `free`."""
        for which, mask in ((0, free), (1, soon)):
            slots = self._slots[which]
            before, after = slots[name].bit_count(), mask.bit_count()
            slots[name] = mask
            self.gains += after > before
            if before != after and self._names is not None:
                buckets, bit = self._by_count[which], 1 << self._at[name]
                buckets[before] ^= bit
                buckets[after] |= bit
                if after > self._most[which] or (before == self._most[which] and not buckets[before]):
                    self._most[which] = self._find_most(which)

    def mask(self, name: str, soon: bool = False) -> int:
        return self._slots[soon][name]

    def _counted(self, soon: bool) -> list[int]:
        if self._names is None:
            self._names = sorted(self.nodes)
            self._at = {name: at for at, name in enumerate(self._names)}
            for which in (0, 1):
                buckets = self._by_count[which]
                buckets[:] = [0] * (self.size + 1)
                for name, mask in self._slots[which].items():
                    buckets[mask.bit_count()] |= 1 << self._at[name]
                self._most[which] = self._find_most(which)
        return self._by_count[soon]

    def _of_count(self, count: int, soon: bool) -> Iterator[str]:
        """In the order of their names."""
        left = self._counted(soon)[count]
        while left and self._names is not None:
            bit = left & -left
            yield self._names[bit.bit_length() - 1]
            left ^= bit

    def most(self, soon: bool = False) -> int:
        """The most free slots on one node."""
        self._counted(soon)
        return self._most[soon]

    def _find_most(self, which: int) -> int:
        return next((count for count in range(self.size, 0, -1) if self._by_count[which][count]), 0)

    # Gangs --------------------------------------------------------------------------------------------------------

    def span(self, slots: int) -> int:
        """Nodes that a gang of so many slots takes: as few as can be."""
        return -(-slots // self.size)

    def could_hold(self, shape: Shape) -> bool:
        """Whether the pool, empty, takes the whole gang (of whatever kind)."""
        span = self.span(shape.slots)
        return shape.memory_gb <= self.memory_gb and span <= min(shape.nodes, len(self.nodes))

    def find(self, slots: int, job: Job, soon: bool = False) -> Slots | None:
        """The whole gang, or nothing: there is no such thing as a part of a gang. Whole nodes, and the rest on the
        fullest node that has room. With `soon`, slots that are coming free count, free ones are taken first."""
        whole, rest = divmod(slots, self.size)
        if self.most(soon) < (rest or self.size):
            return None
        names = self._whole(whole, job, soon) if whole else []
        if names is None:
            return None
        found = dict.fromkeys(names, (1 << self.size) - 1)
        if rest:
            name = self.best(rest, job, soon, names)
            if name is None:
                return None
            found[name] = self.part(name, rest, soon)
        return found

    def part(self, name: str, count: int, soon: bool) -> int:
        free = self._slots[0][name]
        if not soon or free.bit_count() >= count:
            return lowest(free, count)
        return free | lowest(self._slots[1][name] & ~free, count - free.bit_count())

    def _whole(self, count: int, job: Job, soon: bool) -> list[str] | None:
        if self._counted(soon)[self.size].bit_count() < count:
            return None
        names = self._of_count(self.size, soon)
        if not (job.model or job.environment):
            return list(islice(names, count))
        return sorted(names, key=lambda name: (-self.affinity(name, job), name))[:count]

    def best(self, at_least: int, job: Job, soon: bool, without: Iterable[str] = ()) -> str | None:
        """Of the nodes with room: one that has the job's model and environment, else the fullest."""
        for liked in self._liked(job):
            name = self._best_of(liked, at_least, soon, without)
            if name is not None:
                return name
        return next(self._fullest(at_least, soon, without), None)

    def _fullest(self, at_least: int, soon: bool, without: Iterable[str]) -> Iterator[str]:
        counts = range(at_least, self.most(soon) + 1)
        return (name for count in counts for name in self._of_count(count, soon) if name not in without)

    def _best_of(self, liked: set[str], at_least: int, soon: bool, without: Iterable[str]) -> str | None:
        if len(liked) > MANY:
            return next((name for name in self._fullest(at_least, soon, without) if name in liked), None)
        slots = self._slots[soon]
        room = [(slots[name].bit_count(), name) for name in liked if name not in without]
        return min((pair for pair in room if pair[0] >= at_least), default=(0, None))[1]

    def _liked(self, job: Job) -> Iterator[set[str]]:
        """A model costs more to copy than an environment to prepare."""
        model = self._with_model.get(job.model, set())
        environment = self._with_environment.get(job.environment, set())
        if model and environment:
            yield model & environment
        if model:
            yield model
        if environment:
            yield environment

    def affinity(self, name: str, job: Job) -> int:
        """3: model and environment are there; 2: the model; 1: the environment."""
        node = self.nodes[name]
        return 2 * (job.model in node.models) + (job.environment in node.environments)

    def closest(self, slots: int) -> list[str]:
        """The nodes that lack the fewest slots for the gang."""
        ranked = (name for count in range(self.size, -1, -1) for name in self._of_count(count, True))
        return list(islice(ranked, self.span(slots)))
