"""One-line builders of what the scheduler rules over."""

from __future__ import annotations

from cluster.core.job import Job, Node, Placement, Priority, Shape

ANY_SLOT = Shape(slots=1, memory_gb=1.0)


def a_node(name: str = "n1", slots: int = 4, kind: str = "cpu", memory_gb: float = 16.0) -> Node:
    return Node(name=name, kind=kind, slots=slots, memory_gb=memory_gb)


def gang(slots: int, *kinds: str, memory_gb: float = 1.0, nodes: int = 1) -> Shape:
    return Shape(slots=slots, memory_gb=memory_gb, kinds=kinds, nodes=nodes)


def a_job(
    id: str = "j1",
    shape: Shape = ANY_SLOT,
    queued_at: float = 0.0,
    tenant: str = "acme",
    priority: Priority = Priority.NORMAL,
) -> Job:
    return Job(id=id, tenant=tenant, shape=shape, queued_at=queued_at, priority=priority)


def placed(node: str = "n1", *slots: int) -> Placement:
    return Placement({node: slots or (0,)})
