"""What the scheduler has read, kept between its rounds, so that a round reads only what changed; and every change as events
for the state machine. What is kept equals what reading everything anew would give."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from cluster.core.events import Event, How
from cluster.core.job import ACTIVE, Job, JobState, Node
from cluster.core.slices import Holding
from cluster.core.state import Snapshot, events_between
from cluster.ports import ActiveJob, Attempt, NodeReport, Rows, Shares


class Facts:
    """`now`: the database's clock at the last look."""

    def __init__(self) -> None:
        self.now = 0.0
        self.nodes: dict[str, Node] = {}
        self._waiting: dict[str, Job] = {}
        self._active: dict[str, list[ActiveJob]] = {}
        self._shares = Shares()
        self._reported: dict[str, Node] = {}

    def take(self, rows: Rows, ids: Collection[str] | None) -> list[Event]:
        """`ids`: the jobs that were looked at; None: all."""
        self.now = rows.now
        seen = {job.id for job in rows.waiting} | {active.id for active in rows.active}
        asked = {*ids, *seen} if ids is not None else {*self._waiting, *self._active, *seen}
        before = self._snapshot(asked)
        for job_id in asked:
            self._waiting.pop(job_id, None)
            self._active.pop(job_id, None)
        self._waiting |= {job.id: job for job in rows.waiting}
        for active in rows.active:
            self._active.setdefault(active.id, []).append(active)
        events = self._take_shares(rows.shares) if rows.shares is not None else []
        return events + events_between(before, self._snapshot(asked))

    def see(self, reports: Sequence[NodeReport]) -> list[Event]:
        """All nodes that are there now."""
        self._reported = {report.node.name: report.node for report in reports}
        return self._learn_nodes()

    def active(self) -> Iterator[ActiveJob]:
        return (active for attempts in self._active.values() for active in attempts)

    def active_ids(self) -> frozenset[str]:
        return frozenset(self._active)

    def attempts(self) -> set[Attempt]:
        return {active.key for active in self.active()}

    def waiting(self) -> int:
        return len(self._waiting)

    def _take_shares(self, shares: Shares) -> list[Event]:
        before, self._shares = self._shares, shares
        changed = events_between(Snapshot(tenants=before.tenants), Snapshot(tenants=shares.tenants))
        return [*changed, *self._learn_nodes()]

    def _learn_nodes(self) -> list[Event]:
        before, self.nodes = self.nodes, with_draining(self._reported.values(), self._shares)
        return events_between(Snapshot(nodes=before), Snapshot(nodes=self.nodes))

    def _snapshot(self, ids: Iterable[str]) -> Snapshot:
        waiting = tuple(self._waiting[job_id] for job_id in ids if job_id in self._waiting)
        active = (active for job_id in ids for active in self._active.get(job_id, ()))
        return Snapshot(waiting=waiting, held=_held(active))


def snapshot_of(rows: Rows, nodes: Iterable[Node]) -> Snapshot:
    """All facts as the state machine knows them, from one whole look at the rows."""
    shares = rows.shares or Shares()
    return Snapshot(
        nodes=with_draining(nodes, shares),
        waiting=tuple(rows.waiting),
        held=_held(rows.active),
        tenants=dict(shares.tenants),
    )


def with_draining(nodes: Iterable[Node], shares: Shares) -> dict[str, Node]:
    """A node is emptied when its agent or an operator says so."""
    return {node.name: replace(node, draining=node.draining or node.name in shares.draining) for node in nodes}


def _held(active: Iterable[ActiveJob]) -> Mapping[Attempt, Holding]:
    found = (_holding(one) for one in active)
    return {holding.key: holding for holding in found if holding is not None}


def _holding(active: ActiveJob) -> Holding | None:
    """Whoever has ended and is not yet confirmed dead, or whom its tenant wants stopped, holds its slots still; they count
    as coming free. One that still prepares keeps them: stopped there again and again, it would never train."""
    if active.lease is None:
        return None
    job = replace(active.job, yields=False) if active.state is JobState.PREPARING else active.job
    yielding = How.SUSPEND if active.leaves or active.state not in ACTIVE else active.order
    return Holding(job, active.attempt, active.lease, active.since, yielding, active.parked)
