"""All nodes, in pools of like ones; which slots are held, and which of those come free. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from cluster.core.job import Job, Node, Shape
from cluster.core.kinds import CPU, matches
from cluster.core.placement import Pool, PoolKey, Slots, pool_key
from cluster.core.policy import Policy
from cluster.core.victims import Runners


@dataclass(frozen=True)
class Requirement:
    """What a job asks of nodes; jobs that ask for the same stand in one line."""

    shapes: tuple[tuple[int, float, tuple[str, ...], int], ...]
    region: str
    market: str

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.shapes, self.region, self.market))


def requirement_of(job: Job) -> Requirement:
    shapes = tuple((shape.slots, shape.memory_gb, shape.kinds, shape.nodes) for shape in job.shapes)
    return Requirement(shapes, job.region, job.market)


Option = tuple[Shape, Pool]
"""A shape in a pool that could hold it."""


class SlotConflict(Exception):
    """A slot was granted that another attempt holds: the rows are wrong, and no decision is safe."""


class Pools:
    """`version` changes whenever what could ever fit may have changed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.nodes: dict[str, Node] = {}
        self.runners: dict[PoolKey, Runners] = {}
        self.version = 0
        self.capacity = 0
        self._pools: dict[PoolKey, Pool] = {}
        self._pool_of: dict[str, Pool] = {}
        self.draining: set[str] = set()
        self._widest = 1  # nodes that any gang asked for: of larger pools the size does not matter
        self._held: Slots = {}
        self._coming: Slots = {}

    # Nodes --------------------------------------------------------------------------------------------------------

    def join(self, node: Node) -> None:
        self.leave(node.name)
        self.nodes[node.name] = node
        if node.draining:
            self.draining.add(node.name)
        if node.draining or node.slots <= 0:
            return
        key = pool_key(node)
        if key not in self._pools:
            self._pools[key] = Pool(key)
            self.runners[key] = Runners(node.slots, self._policy)
        pool = self._pool_of[node.name] = self._pools[key]
        memory_gb = pool.memory_gb
        pool.add(node)
        self.capacity += pool.size
        self.runners[key].add(node.name)
        self._update(node.name)
        self._resized(pool, memory_gb)

    def leave(self, name: str) -> None:
        if self.nodes.pop(name, None) is None:
            return
        self.draining.discard(name)
        pool = self._pool_of.pop(name, None)
        if pool is not None:
            memory_gb = pool.memory_gb
            pool.discard(name)
            self.capacity -= pool.size
            self.runners[pool.key].discard(name)
            if not pool.nodes:
                del self._pools[pool.key], self.runners[pool.key]
            self._resized(pool, memory_gb)

    def _resized(self, pool: Pool, memory_gb: float) -> None:
        if len(pool.nodes) <= self._widest or pool.memory_gb != memory_gb:
            self.version += 1

    def pool_of(self, name: str) -> Pool | None:
        """None: it is not there, or takes no jobs."""
        return self._pool_of.get(name)

    def runners_on(self, name: str) -> Runners | None:
        pool = self._pool_of.get(name)
        return None if pool is None else self.runners[pool.key]

    # Slots --------------------------------------------------------------------------------------------------------

    def take(self, wanted: Slots) -> None:
        """Free ones, or ones that are coming free and so promised. Raises `SlotConflict`."""
        for name, mask in wanted.items():
            held, coming = self._held.get(name, 0), self._coming.get(name, 0)
            if held & mask & ~coming:
                raise SlotConflict(f"slots {mask:b} of node {name} overlap with held ones, {held:b}")
        for name, mask in wanted.items():
            self._coming[name] = self._coming.get(name, 0) & ~mask
            self._held[name] = self._held.get(name, 0) | mask
            self._update(name)

    def give(self, back: Slots) -> None:
        for name, mask in back.items():
            self._held[name] = self._held.get(name, 0) & ~mask
            self._coming[name] = self._coming.get(name, 0) & ~mask
            self._update(name)

    def promise(self, slots: Slots, coming: bool = True) -> None:
        """Held slots that are coming free; or not any more."""
        for name, mask in slots.items():
            before = self._coming.get(name, 0)
            self._coming[name] = before | mask if coming else before & ~mask
            self._update(name)

    def is_free(self, slots: Slots) -> bool:
        return all(not self._held.get(name, 0) & mask for name, mask in slots.items())

    def marks(self, names: Mapping[str, object]) -> list[tuple[str, int, int]]:
        """What `restore` needs."""
        return [(name, self._held.get(name, 0), self._coming.get(name, 0)) for name in names]

    def restore(self, marks: list[tuple[str, int, int]]) -> None:
        for name, held, coming in marks:
            self._held[name], self._coming[name] = held, coming
            self._update(name)

    def free(self, name: str, soon: bool = False) -> int:
        """As bits; none where no job may start."""
        pool = self._pool_of.get(name)
        return 0 if pool is None else pool.mask(name, soon)

    def _update(self, name: str) -> None:
        pool = self._pool_of.get(name)
        if pool is None:
            return
        whole = (1 << pool.size) - 1
        held = self._held.get(name, 0)
        soon = whole & (~held | self._coming.get(name, 0))
        pool.update(name, whole & ~held, soon)
        self.runners[pool.key].open(name, soon.bit_count())

    def gains(self) -> list[tuple[int, int]]:
        return [(pool.gains, self.runners[key].gains) for key, pool in self._pools.items()]

    def gained(self) -> dict[int, int]:
        """By the pool's identity."""
        return {id(pool): pool.gains + self.runners[key].gains for key, pool in self._pools.items()}

    def regain(self, gains: list[tuple[int, int]]) -> None:
        """What was only tried out was no gain."""
        for (key, pool), (slots, runners) in zip(self._pools.items(), gains, strict=True):
            pool.gains, self.runners[key].gains = slots, runners

    def advance(self, now: float) -> None:
        for runners in self.runners.values():
            runners.advance(now)

    def settles_after(self, now: float) -> float:
        """When the next runner may be told to give way; inf: none."""
        return min((runners.soonest(now) for runners in self.runners.values()), default=math.inf)

    # What could hold a job ----------------------------------------------------------------------------------------

    def options(self, wanted: Requirement) -> list[Option]:
        """In the order to be tried: the shapes as preferred; the asked kinds in their order; when any kind will do,
        accelerators, and `cpu` slots only where no accelerator of the cluster could ever hold it; small kinds first."""
        found = []
        for slots, memory, kinds, nodes in wanted.shapes:
            shape = Shape(slots, memory, kinds, nodes)
            self._widest = max(self._widest, nodes)
            found += [(shape, pool) for pool in self._able(shape, wanted)]
        return found

    def options_of(self, job: Job) -> list[Option]:
        return self.options(requirement_of(job))

    def _able(self, shape: Shape, wanted: Requirement) -> Iterator[Pool]:
        able = [pool for pool in self._allowed(wanted) if pool.could_hold(shape)]
        if shape.kinds:
            for asked in shape.kinds:
                yield from (pool for pool in able if matches(asked, pool.key.kind))
        else:
            yield from [pool for pool in able if pool.key.kind != CPU] or able

    def _allowed(self, wanted: Requirement) -> Iterator[Pool]:
        for key in sorted(self._pools):
            if wanted.region in ("", key.region) and wanted.market in ("", key.market):
                yield self._pools[key]
