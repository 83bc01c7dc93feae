"""Whatever happens in whatever order: the scheduler settles, what it knows piece by piece is what the rows say, and the store
(which refuses to give a slot twice) never has to refuse."""

from __future__ import annotations

from dataclasses import replace

from builders_cluster import a_job, a_node, gang
from fakes_cluster import FakeDrivers, FakeNodes, ManualClock, MemoryStore
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core.events import How
from cluster.core.job import ACTIVE, TERMINAL, JobState, Priority
from cluster.core.policy import Policy
from cluster.core.state import ClusterState
from cluster.facts import snapshot_of
from cluster.ports import SchedulerParts, SchedulerSettings
from cluster.scheduler import Scheduler

S = JobState
POLICY = Policy(quantum_s=10, min_run_s=5, look_s=1, park_max_s=60, reserve_after_s=20, urgent_share=0.5)
TIMES = SchedulerSettings(lease_ttl_s=1e7, poll_s=1.0, stage_limit_s=1e7, driver_gone_s=0.5, policy=POLICY)

ACTS = (*("queue", "start", "wait") * 4, *("obey",) * 6, "end", "cancel", "kill", "drain", "restart")
STEPS = st.lists(
    st.tuples(st.sampled_from(ACTS), st.integers(0, 9), st.sampled_from(list(Priority))), min_size=10, max_size=60
)


class Machine:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = MemoryStore(self.clock)
        self.drivers = FakeDrivers()
        nodes = (replace(a_node(name, slots=4), park_gb=8.0) for name in ("n1", "n2"))
        self.nodes = FakeNodes(*nodes)
        self.count = 0
        self.restart()
        self.settle(None)

    def restart(self) -> None:
        self.scheduler = Scheduler(lambda: SchedulerParts(self.store, self.drivers, TIMES), self.nodes, self.clock)
        self.scheduler.open()

    def settle(self, changed: set[str] | None) -> None:
        """As the loop does it: what the rounds themselves changed is read by the next one."""
        self.scheduler._inbox.take()
        ids = None if changed is None else frozenset(changed)
        for _ in range(30):
            if not self.scheduler.round(ids):
                return
            ids = self.scheduler._inbox.take()
        raise AssertionError("it does not settle")

    def act(self, act: str, number: int, priority: Priority) -> set[str]:
        """The jobs whose rows changed."""
        facts = self.store.facts
        if act == "queue":
            self.count += 1
            shape = replace(gang(1 + number % 4, "cpu"), park_gb=float(number % 3))
            job = a_job(f"j{self.count}", shape, self.clock(), f"t{number % 3}", priority)
            self.store.queue(job)
            return {job.id}
        if act == "wait":
            self.clock.advance(1 + number * 3)
            return set()
        if act == "restart":
            self.restart()
            self.settle(None)
            return set()
        if act == "drain":
            name = f"n{1 + number % 2}"
            self.nodes.nodes[name] = replace(self.nodes.nodes[name], draining=number < 3)
            self.clock.advance(TIMES.poll_s)
            return set()
        chosen = [id for id, state in sorted(facts.states.items()) if state in ACTIVE]
        return self.act_on(act, chosen[number % len(chosen)], facts.states) if chosen else set()

    def act_on(self, act: str, id: str, states: dict[str, JobState]) -> set[str]:
        key = (id, self.store.facts.jobs[id].attempt)
        order = self.store.facts.orders.get(key)
        if act == "start" and states[id] is S.PREPARING:
            self.store.move(id, S.RUNNING)
        elif act == "obey" and order is How.PARK and states[id] is S.RUNNING:
            self.store.park(id)
        elif act == "obey" and order is not None:
            self.store.move(id, S.SUSPENDED)
        elif act == "end" and states[id] is S.RUNNING:
            self.store.move(id, S.SUCCEEDED)
        elif act == "cancel":
            self.store.move(id, S.CANCELLED)
        elif act == "kill":
            self.drivers.living.discard(key)
            self.clock.advance(TIMES.poll_s)
        return {id}


@settings(max_examples=40)
@given(STEPS)
def test_what_is_known_piece_by_piece_is_what_the_rows_say(steps: list[tuple[str, int, Priority]]) -> None:
    machine = Machine()
    for step in steps:
        machine.settle(machine.act(*step))
        whole = snapshot_of(machine.store.rows(), machine.nodes.nodes.values())
        assert machine.scheduler._state.snapshot() == ClusterState.rebuilt(whole, POLICY).snapshot()
        held = [slot for key, (lease, _) in machine.store.facts.leases.items() if key not in machine.store.facts.parked
                for node, slots in lease.nodes.items() for slot in ((node, one) for one in slots)]  # fmt: skip
        assert len(set(held)) == len(held)


@settings(max_examples=20)
@given(STEPS)
def test_in_the_end_every_job_that_may_run_has_run(steps: list[tuple[str, int, Priority]]) -> None:
    machine = Machine()
    for step in steps:
        machine.settle(machine.act(*step))
    machine.nodes.nodes = {name: replace(node, draining=False) for name, node in machine.nodes.nodes.items()}
    for _ in range(40 * machine.count):
        machine.clock.advance(2 * TIMES.poll_s)
        machine.settle(None)
        for id, state in sorted(machine.store.facts.states.items()):
            if state in ACTIVE:
                for act in ("start", "obey", "end"):
                    machine.act_on(act, id, machine.store.facts.states)
        if all(state in TERMINAL for state in machine.store.facts.states.values()):
            break
    assert set(machine.store.facts.states.values()) <= {S.SUCCEEDED, S.CANCELLED}
    machine.settle(None)
    assert machine.store.facts.leases == {}
