"""Where the opponents put a gang: whole nodes and at most one part, best fit. Plain counts, no slot numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from cluster.core.job import Node
from cluster.core.kinds import matches


class Packing:
    """Free slots of nodes that all have `size` of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kinds: dict[str, str] = {}
        self.free: dict[str, int] = {}

    def add(self, node: Node) -> None:
        self.kinds[node.name] = node.kind
        self.free[node.name] = node.slots

    def discard(self, name: str) -> None:
        self.kinds.pop(name, None)
        self.free.pop(name, None)

    def emptied(self) -> Self:
        """The same nodes with nothing on them."""
        other = type(self)(self.size)
        other.kinds = self.kinds
        other.free = dict.fromkeys(self.free, self.size)
        return other

    def fits(self, nodes: dict[str, int]) -> bool:
        return all(self.free.get(name, -1) >= count for name, count in nodes.items())

    def take(self, nodes: dict[str, int]) -> None:
        for name, count in nodes.items():
            if name in self.free:  # a node that is going still holds what runs there
                self.free[name] -= count

    def give(self, nodes: dict[str, int]) -> None:
        for name, count in nodes.items():
            if name in self.free:
                self.free[name] += count

    def find(self, slots: int, kinds: tuple[str, ...]) -> dict[str, int] | None:
        whole, rest = divmod(slots, self.size)
        if not kinds:
            return self._find(whole, rest, self.free)
        for asked in kinds:
            found = self._find(whole, rest, [name for name, kind in self.kinds.items() if matches(asked, kind)])
            if found is not None:
                return found
        return None

    def _find(self, whole: int, rest: int, names: Iterable[str]) -> dict[str, int] | None:
        free = self.free
        taken: dict[str, int] = {}
        if whole:
            empty = [name for name in names if free[name] == self.size]
            if len(empty) < whole:
                return None
            taken = dict.fromkeys(empty[:whole], self.size)
        if rest:
            best, room = "", self.size + 1
            for name in names:
                if rest <= free[name] < room and name not in taken:
                    best, room = name, free[name]
            if not best:
                return None
            taken[best] = rest
        return taken
