"""Futures of the line: they follow the state machine's own rules, and say nothing where nothing is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core.estimates import OUTLOOK, Outlook
from cluster.core.events import How
from cluster.core.forecast import Guesses, Run, Span, runs, span
from cluster.core.job import Job, Node, Placement, Priority, Shape
from cluster.core.policy import Policy
from cluster.core.slices import Holding
from cluster.core.state import Snapshot

NOW = 1_000_000.0
POLICY = Policy()


def waiting(name: str, slots: int = 1, **more: object) -> Job:
    return replace(Job(name, "acme", Shape(slots, 1.0), NOW - 10), **more)  # type: ignore[arg-type]


def running(name: str, *slots: int, ran_s: float = 0.0, yields: bool = False) -> Holding:
    job = Job(name, "bolt", Shape(len(slots), 1.0, park_gb=1.0), NOW - ran_s, yields=yields)
    return Holding(job, 1, Placement({"n": slots}), NOW - ran_s)


def cluster(slots: int, *jobs: Job, held: tuple[Holding, ...] = (), park_gb: float = 0.0) -> Snapshot:
    node = Node("n", "T4", slots, 16.0, park_gb=park_gb)
    return Snapshot({"n": node}, jobs, {one.key: one for one in held})


def futures(snapshot: Snapshot, **outlooks: Outlook | float) -> list[Run]:
    known = {name: (one,) if isinstance(one, float) else one for name, one in outlooks.items()}
    return list(runs(snapshot, POLICY, NOW, Guesses(known)))


def one_future(snapshot: Snapshot, **outlooks: float) -> Run:
    found = futures(snapshot, **outlooks)
    assert all(future == found[0] for future in found), "nothing was uncertain"
    return found[0]


def test_a_job_starts_when_the_one_before_it_ends() -> None:
    found = one_future(cluster(1, waiting("next"), held=(running("now", 0, ran_s=40.0),)), now=100.0, next=50.0)
    assert found.starts == {"next": NOW + 60}
    assert found.ends == {"now": NOW + 60, "next": NOW + 110}


def test_a_free_slot_is_taken_now() -> None:
    assert one_future(cluster(2, waiting("a"), held=(running("b", 0),)), a=5.0, b=7.0).starts == {"a": NOW}


def test_behind_a_job_of_unknown_length_nothing_is_known() -> None:
    found = one_future(cluster(1, waiting("next"), held=(running("now", 0),)), next=50.0)
    assert found == Run()


def test_one_that_gives_way_does_and_comes_back() -> None:
    long = running("long", 0, ran_s=7200.0, yields=True)
    found = one_future(cluster(1, waiting("short"), held=(long,)), long=9000.0, short=60.0)
    assert found.starts["short"] == NOW
    assert found.ends["short"] == NOW + 60
    assert found.ends["long"] == pytest.approx(NOW + 60 + 1800 + POLICY.switch_cost_s, abs=1)


def test_one_that_was_parked_goes_on_at_less_cost() -> None:
    long = running("long", 0, ran_s=7200.0, yields=True)
    found = one_future(cluster(1, waiting("short"), held=(long,), park_gb=4.0), long=9000.0, short=60.0)
    assert found.ends["long"] == pytest.approx(NOW + 60 + 1800 + POLICY.park_cost_s, abs=1)


@pytest.mark.parametrize("how", How)
def test_an_order_to_give_way_that_was_given_counts(how: How) -> None:
    leaving = replace(running("long", 0, ran_s=7200.0, yields=True), yielding=how)
    found = one_future(cluster(1, waiting("short"), held=(leaving,), park_gb=4.0), long=9000.0, short=60.0)
    assert found.starts["short"] == NOW
    assert found.ends["long"] > found.ends["short"]


def test_priority_goes_first() -> None:
    low, high = waiting("low", priority=Priority.LOW), waiting("high", priority=Priority.HIGH)
    found = one_future(cluster(1, low, high, held=(running("now", 0),)), now=100.0, low=10.0, high=10.0)
    assert found.starts == {"high": NOW + 100, "low": NOW + 110}


def test_a_gang_waits_for_all_its_slots() -> None:
    held = (running("a", 0), running("b", 1))
    assert one_future(cluster(2, waiting("gang", 2), held=held), a=100.0, b=300.0, gang=1.0).starts["gang"] == NOW + 300


def test_a_future_that_takes_too_long_is_broken_off() -> None:
    rounds = iter([True, False])
    snapshot = cluster(1, waiting("a"), waiting("b"))
    found = next(runs(snapshot, POLICY, NOW, Guesses({"a": (100.0,), "b": (100.0,)}, lambda: next(rounds))))
    assert len(found.starts) == 1, "of the second one nothing is known"


def test_each_future_draws_another_run_time_and_all_are_drawn() -> None:
    outlook = tuple(100.0 * (1 + number) for number in range(OUTLOOK))
    found = futures(cluster(1, waiting("next"), held=(running("now", 0),)), now=outlook, next=outlook)
    assert sorted(future.starts["next"] - NOW for future in found) == list(outlook)
    both = {(future.starts["next"], future.ends["next"]) for future in found}
    assert len({round(end - start) for start, end in both}) == OUTLOOK
    assert len({round(end - 2 * start + NOW) for start, end in both}) > 1, "the two are independent"


def test_a_span_says_nothing_of_what_too_few_come_to() -> None:
    assert span([3.0, 1.0, 2.0, 5.0, 4.0], of=5) == Span(3.0, 4.0)
    assert span([1.0, 2.0, 3.0], of=5) == Span(3.0, None)
    assert span([1.0], of=5) == Span()
    assert span([], of=0) == Span()


many_jobs = st.lists(
    st.builds(
        waiting,
        st.sampled_from([f"j{number}" for number in range(8)]),
        st.integers(1, 4),
        priority=st.sampled_from(Priority),
        attained_s=st.sampled_from([0.0, 0.0, 500.0, 90_000.0]),
    ),
    max_size=8,
    unique_by=lambda job: job.id,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(many_jobs, st.floats(100_000, 200_000))
def test_every_known_job_ends_and_takes_at_least_its_time(jobs: list[Job], total_s: float) -> None:
    snapshot = cluster(4, *jobs, held=(running("now", 0, 1, ran_s=9000.0, yields=True),))
    totals = {job.id: total_s for job in jobs} | {"now": total_s}
    known = {name: (one,) for name, one in totals.items()}
    future = next(runs(snapshot, replace(POLICY, look_s=3600.0), NOW, Guesses(known)))
    assert future.starts.keys() >= {job.id for job in jobs}
    assert future.ends.keys() == totals.keys()
    for job in jobs:
        assert future.ends[job.id] - future.starts[job.id] >= total_s - job.attained_s - 1e-3
