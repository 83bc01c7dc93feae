"""Whatever happens in whatever order: no slot twice, no part of a gang, and the state is a function of the facts."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_core import Ledger

from cluster.core.events import (
    Event,
    JobQueued,
    JobReleased,
    JobRemoved,
    NodeJoined,
    NodeLost,
    TenantSet,
    TenantUnset,
)
from cluster.core.explain import explain_all
from cluster.core.job import Job, Node, Priority, Shape, TenantShare
from cluster.core.policy import Policy
from cluster.core.state import ClusterState, Snapshot, events_between

NODES, JOBS, TENANTS = ["n1", "n2", "n3"], [f"j{i}" for i in range(12)], ["acme", "bolt"]
KINDS = ["cpu", "cpu", "A100-40GB", "A100-80GB", "T4"]

nodes = st.builds(
    Node,
    st.sampled_from(NODES),
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.sampled_from([8.0, 40.0, 80.0]),
    models=st.sampled_from([frozenset(), frozenset({"llama"})]),
    park_gb=st.sampled_from([0.0, 8.0]),
    market=st.sampled_from(["on_demand", "spot"]),
    draining=st.sampled_from([False, False, False, True]),
)
shapes = st.builds(
    Shape,
    slots=st.integers(1, 6),
    memory_gb=st.sampled_from([4.0, 30.0, 70.0]),
    kinds=st.sampled_from([(), (), ("cpu",), ("A100",), ("A100-80GB", "T4")]),
    nodes=st.sampled_from([1, 1, 1, 2, 3]),
    park_gb=st.sampled_from([0.0, 4.0, 5.0]),
)
jobs = st.builds(
    Job,
    st.sampled_from(JOBS),
    st.sampled_from(TENANTS),
    shapes,
    st.integers(0, 900).map(float),
    st.sampled_from(Priority),
    not_before=st.sampled_from([0.0, 0.0, 0.0, 2000.0]),
    alternatives=st.lists(shapes, max_size=1).map(tuple),
    attained_s=st.sampled_from([0.0, 100.0, 400.0, 5000.0]),
    model=st.sampled_from(["", "llama"]),
    market=st.sampled_from(["", "", "spot"]),
    yields=st.sampled_from([True, True, True, False]),
)
shares = st.builds(
    TenantShare,
    st.sampled_from(TENANTS),
    st.sampled_from([1.0, 2.0]),
    st.integers(0, 4),
    st.none() | st.integers(0, 6),
    st.none() | st.integers(0, 3),
)
happenings = st.one_of(
    st.builds(NodeJoined, nodes),
    st.builds(NodeLost, st.sampled_from(NODES)),
    st.builds(TenantSet, shares),
    st.builds(TenantUnset, st.sampled_from(TENANTS)),
    st.builds(JobQueued, jobs),
    st.builds(JobQueued, jobs),
    st.builds(JobRemoved, st.sampled_from(JOBS)),
    st.sampled_from(JOBS),  # its attempt ends
    st.sampled_from([1.0, 60.0, 400.0, 3000.0]),  # so much time passes, then there are rounds
)
Story = list[Event | str | float]
policies = st.builds(
    Policy,
    min_run_s=st.sampled_from([60.0, 125.0]),
    oldest_share=st.sampled_from([0.05, 0.3]),
    aged_after_s=st.sampled_from([1000.0, 86400.0]),
    reservations=st.integers(0, 2),
)
START = 1000.0

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def _play(story: Story, policy: Policy, live: bool = False) -> tuple[Ledger, float]:
    """As the scheduler drives it: a job that holds slots is not queued again before its release."""
    ledger, now = Ledger(ClusterState(policy), live), START
    for happening in story:
        if isinstance(happening, float):
            now += happening
            for held in list(ledger.state.facts.held.values()):
                if held.yielding:
                    ledger.give_way(held, now)
            ledger.rounds(now)
        elif isinstance(happening, str):
            _end(ledger.state, happening)
        elif not (isinstance(happening, JobQueued) and _holds(ledger.state, happening.job.id)):
            ledger.state.apply(happening)
    return ledger, now


def _end(state: ClusterState, job_id: str) -> None:
    for key in list(state.facts.held):
        if key[0] == job_id:
            state.apply(JobReleased(*key))


def _holds(state: ClusterState, job_id: str) -> bool:
    return any(key[0] == job_id for key in state.facts.held)


stories = st.lists(happenings, max_size=40)


@unhurried
@given(stories, policies, st.booleans())
def test_each_decision_is_possible(story: Story, policy: Policy, live: bool) -> None:
    """No slot twice, no part of a gang, nobody stopped before its time, limits kept: the ledger checks each one."""
    ledger, now = _play(story, policy, live)
    ledger.rounds(now)


@unhurried
@given(stories, policies, st.booleans())
def test_the_state_equals_one_rebuilt_from_its_facts(story: Story, policy: Policy, live: bool) -> None:
    ledger, now = _play(story, policy, live)
    state = ledger.state
    rebuilt = ClusterState.rebuilt(state.snapshot(), policy)
    assert rebuilt.decide(now) == state.decide(now)
    assert rebuilt.snapshot() == state.snapshot()
    assert rebuilt.next_look(now) == state.next_look(now)


@unhurried
@given(stories, policies, st.sampled_from([-500.0, 0.0, 700.0]))
def test_deciding_changes_nothing_whenever_it_is_asked(story: Story, policy: Policy, later: float) -> None:
    ledger, now = _play(story, policy)
    state = ledger.state
    first, before = state.decide(now), state.snapshot()
    other = state.decide(now + later)
    assert other == ClusterState.rebuilt(before, policy).decide(now + later)
    assert state.decide(now) == first
    assert state.snapshot() == before


@unhurried
@given(stories, stories, policies)
def test_the_events_between_two_states_lead_from_one_to_the_other(one: Story, other: Story, policy: Policy) -> None:
    state, goal = _play(one, policy)[0].state, _play(other, policy)[0].state
    for event in events_between(state.snapshot(), goal.snapshot()):
        state.apply(event)
    later = START + 1e5
    assert state.decide(later) == goal.decide(later)
    assert state.snapshot() == goal.snapshot()
    assert events_between(state.snapshot(), goal.snapshot()) == []


@unhurried
@given(stories, policies, st.booleans())
def test_five_more_rounds_change_nothing(story: Story, policy: Policy, live: bool) -> None:
    ledger, now = _play(story, policy, live)
    ledger.rounds(now)
    settled = ledger.state.snapshot()
    assert [ledger.rounds(now) for _ in range(5)] == [0] * 5
    assert ledger.state.snapshot() == settled


@unhurried
@given(stories, policies)
def test_every_waiting_job_has_a_reason_and_a_place(story: Story, policy: Policy) -> None:
    ledger, now = _play(story, policy)
    state = ledger.state
    waiting = state.snapshot().waiting
    granted = {decision.job.id for decision in state.decide(now) if hasattr(decision, "job")}
    found = explain_all(state, [job.id for job in waiting], now)
    for job in waiting:
        assert (not found[job.id].reasons) == (job.id in granted)
    assert [found[job.id].position for job in state.snapshot().waiting] == list(range(1, len(waiting) + 1))


@unhurried
@given(st.lists(jobs, unique_by=lambda job: job.id), nodes)
def test_a_cluster_of_one_slot_serves_in_order(waiting: list[Job], node: Node) -> None:
    state = ClusterState()
    for job in waiting:
        plain = replace(job, shape=Shape(1, 0.0), not_before=0.0, attained_s=0.0, alternatives=(), market="")
        state.apply(JobQueued(plain))
    state.apply(NodeJoined(replace(node, slots=1, draining=False)))
    first = sorted(waiting, key=lambda job: (job.priority.rank, job.queued_at, job.id))[:1]
    assert [decision.job.id for decision in state.decide(START) if hasattr(decision, "job")] == [
        job.id for job in first
    ]


def test_an_empty_cluster_decides_nothing() -> None:
    assert ClusterState().decide(START) == []
    assert ClusterState().snapshot() == Snapshot()
