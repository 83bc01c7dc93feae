"""Whole runs under a virtual clock: what is served is what was asked for, nobody waits for ever, no pair takes turns for
nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_core import Ledger

from cluster.core.events import JobQueued, NodeJoined, NodeLost
from cluster.core.job import Job, Node, Priority, Shape
from cluster.core.policy import Policy
from cluster.core.state import ClusterState

POLICY = Policy(look_s=60.0, aged_after_s=2 * 3600.0, oldest_share=0.25)

few = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Replay:
    """`runs`: how long each job must run, in seconds."""

    ledger: Ledger
    runs: dict[str, float] = field(default_factory=dict)
    now: float = 0.0

    def come(self, job: Job, run_s: float) -> None:
        self.runs[job.id] = run_s
        self.ledger.state.apply(JobQueued(job))

    def until(self, end: float) -> None:
        """Rounds at every end of a job and whenever the state machine wants to look."""
        self.ledger.rounds(self.now)
        while (now := min(self._next(), end)) < end or now > self.now:
            self.now = now
            for held in list(self.ledger.state.facts.held.values()):
                if not held.parked and held.attained_s(now) >= self.runs[held.job.id] - 1e-6:
                    self.ledger.end(held, now)
            self.ledger.rounds(now)
            if now == end:
                return

    def _next(self) -> float:
        facts = self.ledger.state.facts
        ends = [one.since + self.runs[one.job.id] - one.job.attained_s for one in facts.held.values() if not one.parked]
        look = self.ledger.state.next_look(self.now)
        return max(self.now, min([*ends, *([look] if look is not None else [])], default=float("inf")))


def replay(*nodes: Node) -> Replay:
    state = ClusterState(POLICY)
    for node in nodes:
        state.apply(NodeJoined(node))
    return Replay(Ledger(state))


def a_cpu(name: str, slots: int = 4, park_gb: float = 0.0) -> Node:
    return Node(name, "cpu", slots, 16.0, park_gb=park_gb)


comers = st.lists(
    st.tuples(
        st.floats(0, 4000).map(round),
        st.sampled_from([30.0, 200.0, 900.0, 5000.0]),
        st.sampled_from([1, 1, 2, 4, 6]),
        st.sampled_from(Priority),
        st.sampled_from(["acme", "bolt", "core"]),
        st.sampled_from([0.0, 4.0]),
    ),
    max_size=15,
)


@few
@given(comers, st.sampled_from([0.0, 6.0]))
def test_every_job_runs_once_and_exactly_as_long_as_it_must(arrivals: list[tuple], park_gb: float) -> None:  # type: ignore[type-arg]
    world = replay(a_cpu("n1", park_gb=park_gb), a_cpu("n2", park_gb=park_gb))
    for number, (at, run_s, slots, priority, tenant, parks) in enumerate(sorted(arrivals)):
        world.until(float(at))
        world.come(Job(f"j{number}", tenant, Shape(slots, 1.0, nodes=2, park_gb=parks), float(at), priority), run_s)
    world.until(1e6)
    facts = world.ledger.state.facts
    assert not facts.held
    assert not len(facts.waiting)
    assert set(world.ledger.finished) == set(world.runs)
    for job_id, run_s in world.runs.items():
        assert abs(world.ledger.served[job_id] - run_s) < 1e-3


@settings(few, max_examples=4)
@given(st.sampled_from([150.0, 400.0]), st.sampled_from(Priority), st.sampled_from([1, 3, 8]), st.booleans())
def test_nothing_waits_for_ever_under_a_stream(each_s: float, stream: Priority, slots: int, started: bool) -> None:
    """More small jobs come than the cluster can serve, of whatever priority; the gang, even of low priority and half
    done, gets its slots, and ends."""
    world = replay(a_cpu("n1"), a_cpu("n2"))
    gang = Job("gang", "acme", Shape(slots, 1.0, nodes=2), 0.0, Priority.LOW, attained_s=2000.0 if started else 0.0)
    world.come(gang, 2600.0)
    world.ledger.served["gang"] = gang.attained_s
    for number in range(150):
        at = number * each_s / 10
        world.until(at)
        job = Job(f"s{number}", f"t{number % 3}", Shape(1, 1.0), at, stream)
        world.come(job, each_s)
    begun = world.now
    world.until(begun + 100.0)
    extra = 0
    while "gang" not in world.ledger.finished:
        assert world.now < 20 * 3600.0, "the gang starves"
        extra += 1
        world.come(Job(f"x{extra}", f"t{extra % 3}", Shape(1, 1.0), world.now, stream), each_s)
        world.until(world.now + each_s / 10)


@few
@given(st.lists(st.sampled_from([0.0, 200.0, 1000.0, 5000.0]), min_size=2, max_size=6), st.sampled_from([0.0, 4.0]))
def test_no_pair_displaces_each_other_in_turn(attained: list[float], park_gb: float) -> None:
    """Long jobs on one slot: each turn is at least a quantum, and there are few of them."""
    world = replay(a_cpu("n1", slots=1, park_gb=park_gb))
    for number, had in enumerate(attained):
        world.come(Job(f"j{number}", "acme", Shape(1, 1.0, park_gb=park_gb), 0.0, attained_s=had), 1e6)
    world.until(20_000.0)
    times = [at for at, _ in world.ledger.displaced]
    assert all(later - earlier >= POLICY.min_run_s for earlier, later in pairwise(times))
    assert len(times) <= 20_000.0 / POLICY.quantum_s / 2 + len(attained) * 4


@few
@given(st.lists(st.tuples(st.sampled_from(["n1", "n2"]), st.sampled_from([100.0, 700.0])), max_size=6))
def test_lost_nodes_cost_no_job(losses: list[tuple[str, float]]) -> None:
    """A node goes, its jobs are released and queued again, it comes back: all of them finish."""
    world = replay(a_cpu("n1"), a_cpu("n2"))
    state = world.ledger.state
    for number in range(8):
        world.come(Job(f"j{number}", "acme", Shape(1 + number % 4, 1.0), 0.0), 1000.0)
    for name, later in losses:
        world.until(world.now + later)
        state.apply(NodeLost(name))
        for held in [one for one in state.facts.held.values() if name in one.placement.nodes]:
            world.ledger.give_way(replace(held, parked=False), world.now)
        world.until(world.now + 50.0)
        state.apply(NodeJoined(a_cpu(name)))
    world.until(1e6)
    assert set(world.ledger.finished) == set(world.runs)
    assert all(abs(world.ledger.served[job_id] - 1000.0) < 1e-3 for job_id in world.runs)
