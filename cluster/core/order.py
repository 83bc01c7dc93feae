"""Who goes first: priority, then who waited longest. Pure. Fairness between tenants and aging belong here."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from cluster.core.job import Job

Turn = tuple[int, float, str]


def turn(job: Job) -> Turn:
    """The smaller one goes first; the id makes the order total."""
    return job.priority.rank, job.queued_at, job.id


class WaitingLine:
    """The waiting jobs, always in order."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._turns: list[Turn] = []

    def put(self, job: Job) -> None:
        self.remove(job.id)
        self._jobs[job.id] = job
        insort(self._turns, turn(job))

    def remove(self, job_id: str) -> None:
        job = self._jobs.pop(job_id, None)
        if job is not None:
            del self._turns[bisect_left(self._turns, turn(job))]

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def __iter__(self) -> Iterator[Job]:
        return (self._jobs[job_id] for _, _, job_id in self._turns)

    def __len__(self) -> int:
        return len(self._turns)
