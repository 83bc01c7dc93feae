"""The unfinished jobs that were submitted first: a share of the slots is theirs, which bounds every wait. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from sortedcontainers import SortedList

from cluster.core.job import Job

LOOKED_AT = 4096
"""Jobs that their tenant's limit keeps out do not count; past so many of them one looks no further."""


class Known(NamedTuple):
    born: float
    slots: int
    tenant: str


class Elders:
    """Jobs that wait or hold, counted: one that is parked, or released and queued again at once, does both."""

    def __init__(self) -> None:
        self._line = SortedList()  # (born, id)
        self._known: dict[str, Known] = {}
        self._times: Counter[str] = Counter()
        self._last: tuple[float, str] = (0.0, "")  # of those looked at last: who comes after it changes nothing
        self._full = False
        self.members: frozenset[str] = frozenset()
        self.stale = True

    def add(self, job: Job) -> None:
        self._times[job.id] += 1
        if self._times[job.id] > 1 and self._known[job.id] == Known(job.born, job.shape.slots, job.tenant):
            return
        before = self._known.get(job.id)
        if before is not None:
            self._line.remove((before.born, job.id))
        self._known[job.id] = Known(job.born, job.shape.slots, job.tenant)
        self._line.add((job.born, job.id))
        self._touch((job.born, job.id))

    def remove(self, job_id: str) -> None:
        self._times[job_id] -= 1
        if self._times[job_id] <= 0:
            known = self._known.pop(job_id)
            del self._times[job_id]
            self._line.remove((known.born, job_id))
            self._touch((known.born, job_id))

    def _touch(self, place: tuple[float, str]) -> None:
        if not self._full or place <= self._last:
            self.stale = True

    def choose(self, slots: float, limit_of: Callable[[str], int | None]) -> frozenset[str]:
        """Oldest first, while they fit into so many slots and their tenants' limits. Returns whose membership changed."""
        chosen: set[str] = set()
        of_tenant: Counter[str] = Counter()
        left, skipped, self._full = slots, 0, False
        for born, job_id in self._line:
            self._last, known = (born, job_id), self._known[job_id]
            limit = limit_of(known.tenant)
            if limit is not None and of_tenant[known.tenant] + known.slots > limit:
                skipped += 1
            elif known.slots <= left:
                left -= known.slots
                of_tenant[known.tenant] += known.slots
                chosen.add(job_id)
            if skipped > LOOKED_AT or (job_id not in chosen and known.slots > left):
                self._full = True
                break
        before, self.members = self.members, frozenset(chosen)
        self.stale = False
        return before ^ self.members
