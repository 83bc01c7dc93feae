"""The scheduler's view of a cluster, a deterministic state machine: events in, decisions out; no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.core.events import (
    Decision,
    Event,
    How,
    JobGranted,
    JobParked,
    JobQueued,
    JobReleased,
    JobRemoved,
    JobYielding,
    NodeJoined,
    NodeLost,
    TenantSet,
    TenantUnset,
)
from cluster.core.facts import Facts
from cluster.core.job import Job, Node, TenantShare
from cluster.core.policy import Policy
from cluster.core.rounds import Round
from cluster.core.slices import Attempt, Holding


@dataclass(frozen=True)
class Snapshot:
    """All of a state, comparable: two states that went different ways to the same facts have equal snapshots."""

    nodes: Mapping[str, Node] = field(default_factory=dict)
    waiting: tuple[Job, ...] = ()
    """In the order of their turns. A parked job is among `held` only."""
    held: Mapping[Attempt, Holding] = field(default_factory=dict)
    tenants: Mapping[str, TenantShare] = field(default_factory=dict)


class ClusterState:
    def __init__(self, policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self.facts = Facts(self.policy)

    @classmethod
    def rebuilt(cls, snapshot: Snapshot, policy: Policy | None = None) -> ClusterState:
        state = cls(policy)
        for event in events_between(Snapshot(), snapshot):
            state.apply(event)
        return state

    def apply(self, event: Event) -> None:
        """Raises `SlotConflict`. An event that is already true changes nothing."""
        facts = self.facts
        match event:
            case NodeJoined(node):
                facts.join(node)
            case NodeLost(name):
                facts.lose(name)
            case TenantSet(share):
                facts.entitle(share)
            case TenantUnset(name):
                facts.entitle(TenantShare(name))
            case JobQueued(job):
                facts.queue(job)
            case JobRemoved(job_id):
                facts.unqueue(job_id)
            case JobGranted(job, attempt, placement, since, parked):
                facts.hold(Holding(job, attempt, placement, since, parked=parked))
                facts.memory.done((job.id, tuple(placement.nodes.items())))
                facts.unqueue(job.id)
            case JobReleased(job_id, attempt):
                facts.let_go((job_id, attempt))
            case JobYielding(job_id, attempt, how):
                self._yielding((job_id, attempt), how)
            case JobParked(job_id, attempt, at):
                self._parked((job_id, attempt), at)

    def _yielding(self, key: Attempt, how: How) -> None:
        holding = self.facts.held.get(key)
        if holding is not None:
            self.facts.hold(replace(holding, yielding=how))
            self.facts.memory.done(key)

    def _parked(self, key: Attempt, at: float) -> None:
        holding = self.facts.held.get(key)
        if holding is not None and not holding.parked:
            job = replace(holding.job, attained_s=holding.attained_s(at))
            self.facts.hold(replace(holding, job=job, since=at, yielding=None, parked=True))

    def decide(self, now: float) -> list[Decision]:
        """Who gets slots now, and who gives way. Changes nothing: a decision counts when it comes back as an event."""
        self.facts.advance(now)
        self.facts.memory.begin()
        decisions = Round(self.facts, now, remembers=True).decisions()
        self.facts.memory.decided(decisions)
        return decisions

    def next_look(self, now: float) -> float | None:
        """When to decide again if nothing happens before; None: time alone changes nothing."""
        return self.facts.next_look(now)

    def snapshot(self) -> Snapshot:
        facts = self.facts
        return Snapshot(dict(facts.pools.nodes), facts.in_order(), dict(facts.held), facts.ledger.shares())


def events_between(now: Snapshot, then: Snapshot) -> list[Event]:
    """The events that lead from one snapshot to another: releases first, so that what they free can be held again."""
    waiting = {job.id: job for job in now.waiting}
    wanted = {job.id: job for job in then.waiting}
    gone: list[Event] = [JobReleased(*key) for key, held in now.held.items() if _let_go(held, then.held.get(key))]
    gone += [NodeLost(name) for name in now.nodes if name not in then.nodes]
    gone += [TenantUnset(name) for name in now.tenants if name not in then.tenants]
    gone += [JobRemoved(job_id) for job_id in waiting if job_id not in wanted]
    come: list[Event] = [NodeJoined(node) for name, node in then.nodes.items() if now.nodes.get(name) != node]
    come += [TenantSet(share) for name, share in then.tenants.items() if now.tenants.get(name) != share]
    come += [event for key, held in then.held.items() if now.held.get(key) != held for event in _held_as(held)]
    come += [JobQueued(job) for job_id, job in wanted.items() if waiting.get(job_id) != job]
    return gone + come


def _let_go(held: Holding, then: Holding | None) -> bool:
    """An order to give way, a review of what is known: the slots stay."""
    return then is None or then.placement != held.placement or then.parked != held.parked


def _held_as(held: Holding) -> list[Event]:
    came: list[Event] = [JobGranted(held.job, held.attempt, held.placement, held.since, held.parked)]
    return came if held.yielding is None else [*came, JobYielding(held.job.id, held.attempt, held.yielding)]
