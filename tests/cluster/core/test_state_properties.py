"""Whatever happens in whatever order: no slot twice, no part of a gang, and the state is a function of the facts."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.core.events import (
    Event,
    JobGranted,
    JobQueued,
    JobReleased,
    JobRemoved,
    NodeJoined,
    NodeLost,
    TenantLimited,
)
from cluster.core.explain import explain
from cluster.core.job import Job, Node, Priority, Shape
from cluster.core.kinds import matches
from cluster.core.state import ClusterState, Policy, Snapshot, events_between

NODES, JOBS, TENANTS = ["n1", "n2", "n3"], [f"j{i}" for i in range(12)], ["acme", "bolt"]
KINDS = ["cpu", "A100-40GB", "A100-80GB", "T4"]

nodes = st.builds(
    Node, st.sampled_from(NODES), st.sampled_from(KINDS), st.integers(1, 4), st.sampled_from([8.0, 40.0, 80.0])
)
shapes = st.builds(
    Shape,
    slots=st.integers(1, 5),
    memory_gb=st.sampled_from([4.0, 30.0, 70.0]),
    kinds=st.sampled_from([(), ("cpu",), ("A100",), ("A100-80GB", "T4")]),
    nodes=st.sampled_from([1, 1, 1, 2]),
)
jobs = st.builds(
    Job,
    st.sampled_from(JOBS),
    st.sampled_from(TENANTS),
    shapes,
    st.integers(0, 900).map(float),
    st.sampled_from(Priority),
    not_before=st.sampled_from([0.0, 0.0, 2000.0]),
)
happenings = st.one_of(
    st.builds(NodeJoined, nodes),
    st.builds(NodeLost, st.sampled_from(NODES)),
    st.builds(TenantLimited, st.sampled_from(TENANTS), st.none() | st.integers(0, 6)),
    st.builds(JobQueued, jobs),
    st.builds(JobRemoved, st.sampled_from(JOBS)),
    st.builds(JobReleased, st.sampled_from(JOBS), st.just(1)),
    st.just("round"),
)
NOW = 1000.0

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def _play(story: list[Event | str]) -> ClusterState:
    """As the scheduler drives it: a job that holds slots is not queued again before its release."""
    state = ClusterState(Policy(reserve_after_s=300))
    for happening in story:
        if happening == "round":
            _grant_all(state)
        elif not (isinstance(happening, JobQueued) and (happening.job.id, 1) in state.snapshot().held):
            assert not isinstance(happening, str)
            state.apply(happening)
    return state


def _grant_all(state: ClusterState) -> int:
    decisions = state.decide(NOW)
    for decision in decisions:
        job, placement = decision.job, decision.placement
        state.apply(JobGranted(job.id, 1, job.tenant, placement))  # raises SlotConflict if a slot were held twice
    return len(decisions)


@unhurried
@given(st.lists(happenings, max_size=40))
def test_a_decision_is_a_whole_gang_on_one_fitting_node_within_the_tenants_limit(story: list[Event | str]) -> None:
    state = _play(story)
    before = state.snapshot()
    for decision in state.decide(NOW):
        [(name, slots)] = decision.placement.nodes.items()
        node, shape = before.nodes[name], decision.job.shape
        assert len(set(slots)) == shape.slots
        assert set(slots) <= set(range(node.slots))
        assert shape.nodes == 1
        assert node.memory_gb >= shape.memory_gb
        assert not shape.kinds or any(matches(asked, node.kind) for asked in shape.kinds)
        assert decision.job.not_before <= NOW
    _grant_all(state)
    after = state.snapshot()
    for tenant, limit in after.limits.items():
        new = [held for key, held in after.held.items() if key not in before.held and held.tenant == tenant]
        held_now = sum(held.placement.slots for held in after.held.values() if held.tenant == tenant)
        assert not new or held_now <= limit


@unhurried
@given(st.lists(happenings, max_size=40))
def test_no_slot_is_ever_held_twice(story: list[Event | str]) -> None:
    held = [
        (node, slot)
        for holding in _play(story).snapshot().held.values()
        for node, slots in holding.placement.nodes.items()
        for slot in slots
    ]
    assert len(held) == len(set(held))


@unhurried
@given(st.lists(happenings, max_size=40))
def test_the_state_equals_one_rebuilt_from_its_facts(story: list[Event | str]) -> None:
    state = _play(story)
    rebuilt = ClusterState.rebuilt(state.snapshot(), state.policy)
    assert rebuilt.snapshot() == state.snapshot()
    assert rebuilt.free() == state.free()
    assert rebuilt.decide(NOW) == state.decide(NOW)


@unhurried
@given(st.lists(happenings, max_size=30), st.lists(happenings, max_size=30))
def test_the_events_between_two_states_lead_from_one_to_the_other(
    one: list[Event | str], other: list[Event | str]
) -> None:
    state, goal = _play(one), _play(other)
    for event in events_between(state.snapshot(), goal.snapshot()):
        state.apply(event)
    assert state.snapshot() == goal.snapshot()
    assert state.free() == goal.free()
    assert events_between(state.snapshot(), goal.snapshot()) == []


@unhurried
@given(st.lists(happenings, max_size=40))
def test_five_more_rounds_change_nothing(story: list[Event | str]) -> None:
    state = _play(story)
    _grant_all(state)
    settled = state.snapshot()
    assert [_grant_all(state) for _ in range(5)] == [0] * 5
    assert state.snapshot() == settled


@unhurried
@given(st.lists(happenings, max_size=40))
def test_every_waiting_job_has_a_reason_and_a_place(story: list[Event | str]) -> None:
    state = _play(story)
    granted = {decision.job.id for decision in state.decide(NOW)}
    positions = []
    for job in state.snapshot().waiting:
        found = explain(state, job.id, NOW)
        assert found is not None
        assert (not found.reasons) == (job.id in granted)
        positions.append(found.position)
    assert positions == list(range(1, len(positions) + 1))


@unhurried
@given(st.lists(jobs, unique_by=lambda job: job.id), nodes)
def test_a_cluster_of_one_slot_serves_in_order(waiting: list[Job], node: Node) -> None:
    state = ClusterState()
    for job in waiting:
        state.apply(JobQueued(replace(job, shape=Shape(1, 0.0), not_before=0.0)))
    state.apply(NodeJoined(replace(node, slots=1)))
    first = sorted(waiting, key=lambda job: (job.priority.rank, job.queued_at, job.id))[:1]
    assert [decision.job.id for decision in state.decide(NOW)] == [job.id for job in first]


def test_an_empty_cluster_decides_nothing() -> None:
    assert ClusterState().decide(NOW) == []
    assert ClusterState().snapshot() == Snapshot()
