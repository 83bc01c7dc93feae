"""Where a job fits: kind, memory, a whole gang on one node, best fit. Pure. Gangs over several nodes belong here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from cluster.core.job import Node, Placement, Shape
from cluster.core.kinds import CPU, matches, memory_gb

FreeSlots = Mapping[str, frozenset[int]]
"""Node name → slots that nobody holds."""


def could_hold(shape: Shape, node: Node) -> bool:
    """Whether the node, empty, takes the whole gang (of whatever kind)."""
    return shape.nodes == 1 and shape.slots <= node.slots and shape.memory_gb <= node.memory_gb


def tiers(shape: Shape, nodes: Collection[Node]) -> Iterator[list[Node]]:
    """Nodes that could hold the gang, in groups to be tried one after the other: the asked kinds in their order;
    when any kind will do, accelerators, and `cpu` slots only where no accelerator of the cluster could ever hold it."""
    able = [node for node in nodes if could_hold(shape, node)]
    if shape.kinds:
        for asked in shape.kinds:
            yield [node for node in able if matches(asked, node.kind)]
    else:
        yield [node for node in able if node.kind != CPU] or able


def place(shape: Shape, nodes: Collection[Node], free: FreeSlots) -> Placement | None:
    """The gang on one node, or nothing: there is no such thing as a part of a gang.

    Of the nodes with room the smallest kind is taken (large ones are for those who need them), of these the fullest."""
    for group in tiers(shape, nodes):
        fitting = [node for node in group if len(free[node.name]) >= shape.slots]
        if fitting:
            best = min(fitting, key=_fit(free))
            return Placement({best.name: tuple(sorted(free[best.name])[: shape.slots])})
    return None


def _fit(free: FreeSlots) -> Callable[[Node], tuple[float, int, str]]:
    # Rated, not reported, memory: two nodes of one kind differ by a few MiB, which must not decide.
    return lambda node: (memory_gb(node.kind) or 0.0, len(free[node.name]), node.name)


def best_to_wait_for(shape: Shape, nodes: Collection[Node], free: FreeSlots) -> Node | None:
    """The node that lacks the fewest slots for the gang; None: no node could ever hold it."""
    for group in tiers(shape, nodes):
        if group:
            return min(group, key=lambda node: (shape.slots - len(free[node.name]), node.name))
    return None
