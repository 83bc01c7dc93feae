"""Who goes first: a class, then how little more service a job is thought to need. Pure."""

from __future__ import annotations

from enum import IntEnum

from cluster.core.job import Job, Priority
from cluster.core.policy import Policy

Turn = tuple[int, float, float, str]
"""Rank, index, waiting since, id. The smaller one goes first; the id makes the order total."""

NEWCOMER = 1e-3
"""A newcomer counts as needing its attained service times this: it goes before all who are none."""
LEAST_S = 1e-6


class Rank(IntEnum):
    """The smaller goes first. `OWED_…`: within what its tenant is guaranteed."""

    AGED = 0
    URGENT = 1
    ELDER = 2
    OWED_HIGH = 3
    OWED_NORMAL = 4
    OWED_LOW = 5
    HIGH = 6
    NORMAL = 7
    LOW = 8

    def owed(self) -> Rank:
        return Rank(self - 3) if self >= Rank.HIGH else self

    @property
    def is_owed(self) -> bool:
        return Rank.OWED_HIGH <= self <= Rank.OWED_LOW


RANK_OF = {Priority.URGENT: Rank.HIGH, Priority.HIGH: Rank.HIGH, Priority.NORMAL: Rank.NORMAL, Priority.LOW: Rank.LOW}
"""Before allowance, age and guarantee are looked at."""


def expected_s(attained_s: float, policy: Policy) -> float:
    """What a job is thought to need still: the time that it has run, for long run times have heavy tails."""
    return attained_s if attained_s >= policy.newcomer_s else max(NEWCOMER * attained_s, LEAST_S)


def index(job: Job, policy: Policy, weight: float) -> float:
    """Its place in the line, within its class."""
    seconds = expected_s(job.attained_s, policy)
    if job.attained_s >= policy.newcomer_s:
        seconds *= job.shape.slots**policy.line_exponent
    return seconds / weight
