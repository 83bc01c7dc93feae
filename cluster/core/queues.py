"""The waiting jobs: a line for each requirement, in it a queue for each tenant and class, always in order. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from sortedcontainers import SortedList

from cluster.core.fairness import Ledger
from cluster.core.job import Job
from cluster.core.order import Rank, Turn, index
from cluster.core.policy import Policy
from cluster.core.pools import Option, Requirement, requirement_of

AT_HOME = 3
"""So many jobs of each class that wait for a node's model are looked at before it takes one that would have to move."""

RANKED_AS: dict[Rank, tuple[Rank, ...]] = {
    Rank.URGENT: (Rank.URGENT,),
    **dict.fromkeys((Rank.OWED_HIGH, Rank.HIGH), (Rank.URGENT, Rank.HIGH)),
    **dict.fromkeys((Rank.OWED_NORMAL, Rank.NORMAL), (Rank.NORMAL,)),
    **dict.fromkeys((Rank.OWED_LOW, Rank.LOW), (Rank.LOW,)),
    Rank.AGED: (),
    Rank.ELDER: (),
}
"""The classes whose jobs may have a rank."""

Entry = tuple[float, float, str]
"""Index, waiting since, id."""
Sizes = tuple[int, int]
"""Slots of a line's first shape, and of its smallest."""
Name = tuple[str, Rank]
"""Of a queue in its line: tenant and class."""


@dataclass
class Line:
    """`least`: the slots of its smallest shape. `options`: what could hold its jobs, as of `version` of the pools."""

    requirement: Requirement
    slots: int
    least: int
    queues: dict[Name, SortedList] = field(default_factory=dict)
    heads: SortedList = field(default_factory=SortedList)  # (turn, name), of queues whose tenant may take more
    turns: dict[Name, Turn] = field(default_factory=dict)  # those in `heads`
    version: int = -1
    options: list[Option] = field(default_factory=list)
    alive: bool = True
    """Whether its jobs were taken as ones that could run."""
    signature: int = -1
    """Lines of one signature have the same options."""
    head: Turn | None = None

    @property
    def sizes(self) -> Sizes:
        return self.slots, self.least


@dataclass
class Place:
    job: Job
    line: Line
    name: Name
    entry: Entry


class Waiting:
    """A job's class is what `put` says; the rank of its turn follows from that and its tenant's account."""

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._places: dict[str, Place] = {}
        self._lines: dict[Requirement, Line] = {}
        self._of_tenant: defaultdict[str, dict[Sizes, set[tuple[Requirement, Rank]]]] = defaultdict(dict)
        self._urgent: set[tuple[Requirement, Name]] = set()
        self._of_model: defaultdict[tuple[str, Rank], SortedList] = defaultdict(SortedList)  # entries
        self._seen: dict[str, tuple[float, float]] = {}  # tenant → room, what is left of its guarantee

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._places

    def get(self, job_id: str) -> Job | None:
        place = self._places.get(job_id)
        return None if place is None else place.job

    def jobs(self) -> Iterator[Job]:
        return (place.job for place in self._places.values())

    def lines(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def line_of(self, job_id: str) -> Line:
        return self._places[job_id].line

    def class_of(self, job_id: str) -> Rank:
        return self._places[job_id].name[1]

    # Coming and going ---------------------------------------------------------------------------------------------

    def put(self, job: Job, rank: Rank) -> None:
        self.remove(job.id)
        self.put_back(Place(job, self._line(job), (job.tenant, rank), self._entry(job, rank)))

    def put_back(self, place: Place) -> None:
        """What `remove` gave."""
        line, name, entry = place.line, place.name, place.entry
        queue = line.queues.get(name)
        if queue is None:
            queue = line.queues[name] = SortedList()
            self._lines[line.requirement] = line
            self._of_tenant[name[0]].setdefault(line.sizes, set()).add((line.requirement, name[1]))
            if name[1] == Rank.URGENT:
                self._urgent.add((line.requirement, name))
        queue.add(entry)
        if place.job.model:
            self._of_model[place.job.model, name[1]].add(entry)
        self._places[place.job.id] = place
        if queue[0] is entry:
            self._refresh(line, name)

    def remove(self, job_id: str) -> Place | None:
        """None: it did not wait."""
        place = self._places.pop(job_id, None)
        if place is None:
            return None
        line, name = place.line, place.name
        if place.job.model:
            self._of_model[place.job.model, name[1]].remove(place.entry)
        queue = line.queues[name]
        was_head = queue[0] == place.entry
        queue.remove(place.entry)
        if was_head:
            self._refresh(line, name)
        if not queue:
            self._close(line, name)
        return place

    def _close(self, line: Line, name: Name) -> None:
        del line.queues[name]
        sizes = self._of_tenant[name[0]]
        sizes[line.sizes].discard((line.requirement, name[1]))
        if not sizes[line.sizes]:
            del sizes[line.sizes]
        self._urgent.discard((line.requirement, name))
        if not line.queues:
            del self._lines[line.requirement]

    def _line(self, job: Job) -> Line:
        wanted = requirement_of(job)
        line = self._lines.get(wanted)
        if line is None:
            least = min(shape.slots for shape in job.shapes)
            line = Line(wanted, job.shape.slots, least)
        return line

    def _entry(self, job: Job, rank: Rank) -> Entry:
        if rank in (Rank.AGED, Rank.ELDER):
            return job.born, job.queued_at, job.id
        weight = self._ledger.account(job.tenant).share.weight
        return index(job, self._policy, weight), job.queued_at, job.id

    # Turns --------------------------------------------------------------------------------------------------------

    def rank(self, tenant: str, slots: int, of: Rank) -> Rank:
        if of in (Rank.AGED, Rank.ELDER):
            return of
        if of == Rank.URGENT:
            if self._ledger.admits_urgent(tenant, slots):
                return of
            of = Rank.HIGH
        return of.owed() if self._ledger.account(tenant).is_owed(slots) else of

    def turn(self, job_id: str) -> Turn:
        place = self._places[job_id]
        return (self.rank(place.name[0], place.line.slots, place.name[1]), *place.entry)

    def _refresh(self, line: Line, name: Name) -> None:
        queue, before = line.queues[name], line.turns.pop(name, None)
        if before is not None:
            line.heads.remove((before, name))
        if queue and self._ledger.account(name[0]).admits(line.least):
            turn = (self.rank(name[0], line.slots, name[1]), *queue[0])
            line.turns[name] = turn
            line.heads.add((turn, name))
        line.head = line.heads[0][0] if line.heads else None

    def at_home(self, models: Iterable[str], rank: Rank, within: float) -> list[tuple[Turn, Job]]:
        """Of those that wait for a model that is there, the first that are of this rank with an index so small."""
        found = []
        for model in models:
            for of in RANKED_AS[rank]:
                for entry in islice(self._of_model.get((model, of), ()), AT_HOME):
                    if entry[0] > within:
                        break
                    turn = self.turn(entry[2])
                    if turn[0] == rank:
                        found.append((turn, self._places[entry[2]].job))
        return sorted(found, key=lambda one: one[0])

    def tenant_changed(self, tenant: str, always: bool = False) -> None:
        """It holds more or less than before; `always`: or is entitled to other things. Only for gangs of sizes that
        have come to fit its limit or its guarantee, or no longer do, the turns are other ones."""
        account = self._ledger.account(tenant)
        if not (always or account.depends):
            return
        now = (math.inf if account.room is None else account.room, account.share.guaranteed_slots - account.held)
        before = self._seen.get(tenant, (math.inf, -math.inf))
        self._seen[tenant] = now
        for (slots, least), queues in self._of_tenant[tenant].items():
            limit = min(before[0], now[0]) < least <= max(before[0], now[0])
            guarantee = min(before[1], now[1]) < slots <= max(before[1], now[1])
            if always or limit or guarantee:
                for requirement, rank in queues:
                    self._refresh(self._lines[requirement], (tenant, rank))

    def urgent_changed(self) -> None:
        for requirement, name in self._urgent:
            line = self._lines[requirement]
            turn = line.turns.get(name)
            if turn is not None and turn[0] != self.rank(name[0], line.slots, Rank.URGENT):
                self._refresh(line, name)

    def reweigh(self, tenant: str) -> None:
        """Its weight is another one."""
        queues = [queue for queues in self._of_tenant[tenant].values() for queue in queues]
        for requirement, rank in queues:
            for _, _, job_id in list(self._lines[requirement].queues[tenant, rank]):
                self.put(self._places[job_id].job, rank)

    def job(self, job_id: str) -> Job:
        return self._places[job_id].job

    def name_of(self, job_id: str) -> Name:
        return self._places[job_id].name

    def of_line(self, line: Line) -> list[str]:
        return [job_id for queue in line.queues.values() for _, _, job_id in queue]

    def pressing(self) -> bool:
        """Whether somebody waits for whom others give way as soon as they have settled."""
        heads = (line.head for line in self._lines.values())
        return any(head is not None and head[0] <= Rank.OWED_LOW and head[0] != Rank.ELDER for head in heads)

    def position(self, job_id: str) -> int:
        """1 is the next in line."""
        return 1 + self.ahead_of(self.turn(job_id))

    def ahead_of(self, mine: Turn) -> int:
        """How many jobs have an earlier turn."""
        return sum(self._before(line, name, mine) for line in self._lines.values() for name in line.queues)

    def _before(self, line: Line, name: Name, mine: Turn) -> int:
        rank = self.rank(name[0], line.slots, name[1])
        if rank != mine[0]:
            return len(line.queues[name]) if rank < mine[0] else 0
        return bisect_left(line.queues[name], mine[1:])

    def in_order(self) -> tuple[Job, ...]:
        return tuple(self._places[job_id].job for job_id in sorted(self._places, key=self.turn))
