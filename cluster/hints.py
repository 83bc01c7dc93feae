"""Tells nodes which jobs they may get next, so that they prepare meanwhile. Derived from what the state machine knows, which takes
no notice of it: a hint that is lost or wrong costs a little work, no more."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import Any

from cluster.asking import Asking
from cluster.core.facts import Facts
from cluster.core.job import Job, JobState, Node
from cluster.core.queues import Waiting
from cluster.errors import HeliostatError
from cluster.ports import ActiveJob, Attempt, Nodes, SchedulerParts

log = logging.getLogger(__name__)

Upcoming = Callable[[Attempt, Node], Any]

LOOKED_AT = 32
"""So many jobs at most, from the first in line, however many nodes there are."""


class Hints:
    """A job that was named to a node stays named until it is neither waiting nor preparing there."""

    def __init__(self, parts: SchedulerParts, nodes: Nodes, asking: Asking) -> None:
        self._upcoming = parts.upcoming
        self._ahead = parts.settings.ahead
        self._nodes = nodes
        self._asking = asking
        self._named: dict[str, list[Attempt]] = {}
        self._begun = False
        self._logged: set[tuple[str, type[Exception]]] = set()
        """Of jobs that are named: each poll meets the same."""

    def tell(self, facts: Facts, active: Iterable[ActiveJob], changed: Collection[str]) -> None:
        """To be called now and then: what a node is not told of again it lets go. `changed`: jobs whose rows know better
        than the facts, such as those that were granted a moment ago."""
        if self._upcoming is None or self._ahead == 0:
            return
        if not self._begun:  # whoever hinted before us may have named jobs that have gone since
            self._named = {name: [] for name in facts.pools.nodes}
            self._begun = bool(self._named)
        self._drop(facts, active)
        self._name(facts, changed)
        ids = {job_id for keys in self._named.values() for job_id, _ in keys}
        self._logged.difference_update([one for one in tuple(self._logged) if one[0] not in ids])
        for name, keys in list(self._named.items()):
            said = self._asking.ask(
                f"what {name} expects", partial(self._say, self._upcoming, facts.pools.nodes[name], tuple(keys))
            )
            if said == () and not keys:
                del self._named[name]

    def _drop(self, facts: Facts, active: Iterable[ActiveJob]) -> None:
        preparing = {
            (node, *one.key)
            for one in active
            if one.state is JobState.PREPARING and one.lease
            for node in one.lease.nodes
        }
        for name, keys in list(self._named.items()):
            if name in facts.pools.nodes:
                keys[:] = [key for key in keys if (name, *key) in preparing or _waits(facts.waiting, key)]
            else:
                del self._named[name]

    def _name(self, facts: Facts, changed: Collection[str]) -> None:
        named = {key for keys in self._named.values() for key in keys}
        count = min(LOOKED_AT, self._ahead * len(facts.pools.nodes))
        for job in first_in_line(facts.waiting, count):
            key = _next_attempt(job)
            name = None if key in named or job.id in changed else self._node_for(job, facts)
            if name is not None:
                self._named.setdefault(name, []).append(key)

    def _node_for(self, job: Job, facts: Facts) -> str | None:
        """The one that has most of what it needs, of those that could hold it alone and were told of few others."""
        nodes = [
            node
            for shape, pool in facts.pools.options_of(job)
            for node in pool.nodes.values()
            if node.slots >= shape.slots and len(self._named.get(node.name, ())) < self._ahead
        ]
        best = max(nodes, key=partial(_has, job), default=None)
        return None if best is None else best.name

    def _say(self, upcoming: Upcoming, node: Node, keys: Sequence[Attempt]) -> Sequence[Attempt]:
        for key in self._nodes.expect(node.name, keys):
            try:
                self._nodes.prepare_ahead(node.name, upcoming(key, node))
            except Exception as error:  # noqa: BLE001 - one row must not stop the scheduler, nor the hints of others
                self._log_once(node.name, key[0], error)
        return keys

    def _log_once(self, node: str, job_id: str, error: Exception) -> None:
        if (job_id, type(error)) in self._logged:
            return
        self._logged.add((job_id, type(error)))
        if isinstance(error, HeliostatError):  # it waits no more, or its driver will meet the same
            log.info("node %s does not prepare for job %s: %s", node, job_id, error)
        else:
            words = "nothing is prepared ahead for job %s, whose row cannot be read (its driver may fail alike): %r"
            log.error(words, job_id, error, exc_info=error)


def first_in_line(waiting: Waiting, count: int) -> list[Job]:
    """Of tenants that may take more: the heads of their queues are known in order, who stands behind one is looked up."""
    heads = [
        (turn, 0, line.queues[name]) for line in waiting.lines() for turn, name in islice(line.heads, count)
    ]  # no two turns are equal
    heapq.heapify(heads)
    found: list[Job] = []
    while heads and len(found) < count:
        turn, place, queue = heapq.heappop(heads)
        found.append(waiting.job(turn[-1]))
        if place + 1 < len(queue):
            heapq.heappush(heads, (waiting.turn(queue[place + 1][-1]), place + 1, queue))
    return found


def _next_attempt(job: Job) -> Attempt:
    return job.id, job.attempt + 1


def _waits(waiting: Waiting, key: Attempt) -> bool:
    job = waiting.get(key[0])
    return job is not None and _next_attempt(job) == key


def _has(job: Job, node: Node) -> int:
    return (job.model in node.models) + (job.environment in node.environments)
