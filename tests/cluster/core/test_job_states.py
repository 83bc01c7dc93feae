"""The table of states as a whole: all can be reached, and what has ended goes on only by a retry."""

from __future__ import annotations

import pytest

from cluster.core.job import ACTIVE, TERMINAL, TRANSITIONS, JobState, Placement, Priority, may_follow

S = JobState


def _reachable(start: JobState) -> set[JobState]:
    seen, edge = {start}, [start]
    while edge:
        new = set(TRANSITIONS[edge.pop()]) - seen
        seen |= new
        edge += new
    return seen


def test_every_state_has_a_row_and_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert _reachable(S.VALIDATING) == set(JobState)


@pytest.mark.parametrize("state", sorted(set(JobState) - TERMINAL))
def test_every_job_can_still_end(state: JobState) -> None:
    assert _reachable(state) >= {S.SUCCEEDED, S.FAILED, S.CANCELLED}


def test_only_a_retry_leaves_a_terminal_state() -> None:
    left = {(state, then) for state in TERMINAL for then in TRANSITIONS[state]}
    assert left == {(S.FAILED, S.QUEUED)}


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_a_fault_sends_every_active_job_to_recovering(state: JobState) -> None:
    assert may_follow(state, S.RECOVERING)


def test_a_recovering_job_runs_again_only_through_the_queue() -> None:
    assert not TRANSITIONS[S.RECOVERING] & ACTIVE
    assert may_follow(S.RECOVERING, S.QUEUED)


def test_no_state_follows_itself() -> None:
    assert not [state for state in JobState if may_follow(state, state)]


def test_priorities_are_ranked_from_urgent_to_low() -> None:
    assert sorted(Priority, key=lambda priority: priority.rank) == [
        Priority.URGENT,
        Priority.HIGH,
        Priority.NORMAL,
        Priority.LOW,
    ]


def test_a_placement_counts_its_slots_over_nodes() -> None:
    assert Placement({"a": (0, 1), "b": (3,)}).slots == 3
