"""Heliostat's own scheduler in replay: the state machine that runs live, fed the same events. It is told no duration."""

from __future__ import annotations

from dataclasses import replace

from cluster.core.events import (
    Grant,
    JobGranted,
    JobQueued,
    JobReleased,
    NodeJoined,
    NodeLost,
    Resume,
    TenantSet,
    Yield,
)
from cluster.core.job import Job, Node, Shape, TenantShare
from cluster.core.policy import Policy
from cluster.core.state import ClusterState
from cluster.simulation.engine import Move, Start, Stop
from cluster.simulation.trace import TraceJob

MARGIN_S = 95.0
"""Service that a run has brought before it may be cut off, beside the switch."""


def policy_for(switch_cost_s: float) -> Policy:
    least = switch_cost_s + MARGIN_S
    return replace(Policy(), min_run_s=least, quantum_s=least, switch_cost_s=switch_cost_s)


class Heliostat:
    def __init__(self, policy: Policy, slots_per_node: int, tenants: tuple[TenantShare, ...] = ()) -> None:
        self._state = ClusterState(policy)
        self._slots_per_node = slots_per_node
        self._jobs: dict[int, Job] = {}
        self._attempts: dict[int, int] = {}
        self._decided_at: float | None = None  # a round that made nobody give way leaves nothing for a further one
        for share in tenants:
            self._state.apply(TenantSet(share))

    def joined(self, node: Node) -> None:
        self._decided_at = None
        self._state.apply(NodeJoined(node))

    def lost(self, name: str) -> None:
        self._decided_at = None
        self._state.apply(NodeLost(name))

    def submitted(self, job: TraceJob) -> None:
        self._decided_at = None
        nodes = -(-job.slots // self._slots_per_node)
        shape = Shape(job.slots, memory_gb=0.0, kinds=job.kinds, nodes=nodes)
        at = job.submitted_s
        self._jobs[job.number] = Job(_id(job.number), job.tenant, shape, at, job.priority, submitted_at=at)
        self._state.apply(JobQueued(self._jobs[job.number]))

    def stopped(self, number: int, served_s: float, now: float) -> None:
        self._decided_at = None
        attempt = self._attempts[number]
        self._state.apply(JobReleased(_id(number), attempt))
        job = replace(self._jobs[number], queued_at=now, attempt=attempt, attained_s=served_s)
        self._jobs[number] = job
        self._state.apply(JobQueued(job))

    def ended(self, number: int, ran_s: float, now: float) -> None:
        self._decided_at = None
        self._state.apply(JobReleased(_id(number), self._attempts.pop(number)))
        del self._jobs[number]

    def choose(self, now: float) -> list[Move]:
        moves: list[Move] = []
        if self._decided_at == now:
            return moves
        self._decided_at = now
        for decision in self._state.decide(now):
            match decision:
                case Yield(job_id):
                    self._decided_at = None
                    moves.append(Stop(int(job_id)))
                case Grant(job, placement):
                    moves.append(Start(int(job.id), {name: len(slots) for name, slots in placement.nodes.items()}))
                    self._attempts[int(job.id)] = job.attempt + 1
                    self._state.apply(JobGranted(job, job.attempt + 1, placement, now))
                case Resume():
                    raise AssertionError("nothing is parked in replay")
        return moves

    def next_look(self, now: float) -> float | None:
        return self._state.next_look(now)


def _id(number: int) -> str:
    return f"{number:08d}"
