"""The scheduler's view of a cluster, a deterministic state machine: events in, decisions out; no I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.core import placement as placing
from cluster.core.events import (
    Decision,
    Event,
    Grant,
    JobGranted,
    JobQueued,
    JobReleased,
    JobRemoved,
    NodeJoined,
    NodeLost,
    TenantLimited,
)
from cluster.core.job import Job, Node, Placement, Shape
from cluster.core.order import WaitingLine


@dataclass(frozen=True)
class Policy:
    reserve_after_s: float = 300.0
    """The first job in line that has waited so long, and does not fit, has a node kept free for it."""


@dataclass(frozen=True)
class Holding:
    """Slots that one attempt of a job holds."""

    job_id: str
    attempt: int
    tenant: str
    placement: Placement


@dataclass(frozen=True)
class Snapshot:
    """All of a state, comparable: two states that went different ways to the same facts have equal snapshots."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    waiting: tuple[Job, ...] = ()
    """In the order of their turns."""
    held: Mapping[tuple[str, int], Holding] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


class SlotConflict(Exception):
    """A slot was granted that another attempt holds: the rows are wrong, and no decision is safe."""


class ClusterState:
    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self._nodes: dict[str, Node] = {}
        self._limits: dict[str, int] = {}
        self._line = WaitingLine()
        self._held: dict[tuple[str, int], Holding] = {}
        # Indexes over `_held`, kept with every event.
        self._taken: dict[tuple[str, int], tuple[str, int]] = {}  # (node, slot) → (job, attempt)
        self._tenant_slots: Counter[str] = Counter()

    @classmethod
    def rebuilt(cls, snapshot: Snapshot, policy: Policy | None = None) -> ClusterState:
        state = cls(policy)
        for event in events_between(Snapshot(), snapshot):
            state.apply(event)
        return state

    def apply(self, event: Event) -> None:
        """Raises `SlotConflict`. An event that is already true changes nothing."""
        match event:
            case NodeJoined(node):
                self._nodes[node.name] = node
            case NodeLost(name):
                self._nodes.pop(name, None)
            case TenantLimited(tenant, None):
                self._limits.pop(tenant, None)
            case TenantLimited(tenant, int(max_slots)):
                self._limits[tenant] = max_slots
            case JobQueued(job):
                self._line.put(job)
            case JobRemoved(job_id):
                self._line.remove(job_id)
            case JobGranted(job_id, attempt, tenant, placement):
                self._line.remove(job_id)
                self._hold(Holding(job_id, attempt, tenant, placement))
            case JobReleased(job_id, attempt):
                self._let_go((job_id, attempt))

    def _hold(self, holding: Holding) -> None:
        key = (holding.job_id, holding.attempt)
        self._let_go(key)
        slots = [(node, slot) for node, slots in holding.placement.nodes.items() for slot in slots]
        if len(set(slots)) < len(slots) or any(slot in self._taken for slot in slots):
            raise SlotConflict(f"{holding} overlaps with what is held")
        self._held[key] = holding
        self._taken.update(dict.fromkeys(slots, key))
        self._tenant_slots[holding.tenant] += len(slots)

    def _let_go(self, key: tuple[str, int]) -> None:
        holding = self._held.pop(key, None)
        if holding is None:
            return
        for node, slots in holding.placement.nodes.items():
            for slot in slots:
                del self._taken[node, slot]
        self._tenant_slots[holding.tenant] -= holding.placement.slots

    def decide(self, now: float) -> list[Decision]:
        """Whom to grant slots now. Changes nothing: a decision counts when it comes back as an event."""
        return list(Round(self, now).grants())

    def snapshot(self) -> Snapshot:
        return Snapshot(dict(self._nodes), tuple(self._line), dict(self._held), dict(self._limits))

    # What a round and `explain` read.
    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    @property
    def waiting(self) -> WaitingLine:
        return self._line

    def free(self) -> dict[str, frozenset[int]]:
        return {
            name: frozenset(slot for slot in range(node.slots) if (name, slot) not in self._taken)
            for name, node in self._nodes.items()
        }

    def room_of(self, tenant: str) -> int | None:
        """How many slots the tenant may still take; None: no limit."""
        limit = self._limits.get(tenant)
        return None if limit is None else limit - self._tenant_slots[tenant]

    def limit_of(self, tenant: str) -> int | None:
        return self._limits.get(tenant)


class Round:
    """One look along the line: what is free and allowed shrinks as grants are made."""

    def __init__(self, state: ClusterState, now: float) -> None:
        self._state = state
        self._now = now
        self._free = state.free()
        self._given: Counter[str] = Counter()
        self._hopeless: set[Shape] = set()  # free slots only shrink within a round: what did not fit will not
        self.reserved: dict[str, str] = {}
        """Node → the job that it is kept free for."""

    def grants(self) -> Iterable[Grant]:
        for job in self._state.waiting:
            if not any(self._free.values()):
                return
            if job.not_before > self._now or not self._allowed(job):
                continue
            placement = self._place(job.shape)
            if placement is None:
                self._reserve_for(job)
            else:
                self._take(job, placement)
                yield Grant(job, placement)

    def _place(self, shape: Shape) -> Placement | None:
        if shape in self._hopeless:
            return None
        placement = placing.place(shape, self._state.nodes.values(), self._free)
        if placement is None:
            self._hopeless.add(shape)
        return placement

    def _allowed(self, job: Job) -> bool:
        room = self._state.room_of(job.tenant)
        return room is None or self._given[job.tenant] + job.shape.slots <= room

    def _take(self, job: Job, placement: Placement) -> None:
        self._given[job.tenant] += placement.slots
        for node, slots in placement.nodes.items():
            self._free[node] -= frozenset(slots)

    def _reserve_for(self, job: Job) -> None:
        """Smaller jobs behind must not feed on a gang's node for ever. One node at a time is kept, so that waiting for
        a gang idles as little as it can; the gang lacks some of its slots, so all that are free there are its own."""
        if self.reserved or self._now - job.queued_at < self._state.policy.reserve_after_s:
            return
        node = placing.best_to_wait_for(job.shape, self._state.nodes.values(), self._free)
        if node is not None:
            self.reserved[node.name] = job.id
            self._free[node.name] = frozenset()


def events_between(now: Snapshot, then: Snapshot) -> list[Event]:
    """The events that lead from one snapshot to another: releases first, so that what they free can be held again."""
    waiting = {job.id: job for job in now.waiting}
    wanted = {job.id: job for job in then.waiting}
    gone: list[Event] = [JobReleased(*key) for key, held in now.held.items() if then.held.get(key) != held]
    gone += [NodeLost(name) for name in now.nodes if name not in then.nodes]
    gone += [TenantLimited(tenant, None) for tenant in now.limits if tenant not in then.limits]
    gone += [JobRemoved(job_id) for job_id in waiting if job_id not in wanted]
    come: list[Event] = [NodeJoined(node) for name, node in then.nodes.items() if now.nodes.get(name) != node]
    come += [TenantLimited(tenant, most) for tenant, most in then.limits.items() if now.limits.get(tenant) != most]
    come += [
        JobGranted(held.job_id, held.attempt, held.tenant, held.placement)
        for key, held in then.held.items()
        if now.held.get(key) != held
    ]
    come += [JobQueued(job) for job_id, job in wanted.items() if waiting.get(job_id) != job]
    return gone + come
