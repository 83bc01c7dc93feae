"""A cluster in replay and a bookkeeper beside it that checks each decision by the plain rules, without any index."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

from cluster.core.events import (
    Decision,
    Grant,
    How,
    JobGranted,
    JobParked,
    JobQueued,
    JobReleased,
    JobYielding,
    Resume,
    Yield,
)
from cluster.core.job import Job, Placement, Shape
from cluster.core.kinds import matches
from cluster.core.slices import Holding
from cluster.core.state import ClusterState


@dataclass
class Ledger:
    """Carries decisions out at once (`live`: victims keep their slots until told), and checks them."""

    state: ClusterState
    live: bool = False
    served: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    finished: dict[str, float] = field(default_factory=dict)
    displaced: list[tuple[float, str]] = field(default_factory=list)

    def rounds(self, now: float) -> int:
        """Until nothing is decided any more; how many rounds decided something."""
        count = 0
        while decisions := self.state.decide(now):
            self._check(decisions, now)
            for decision in decisions:
                self._carry_out(decision, now)
            count += 1
            assert count < 200, "rounds without end"
        return count

    def end(self, held: Holding, now: float) -> None:
        self.served[held.job.id] += held.attained_s(now) - held.job.attained_s
        self.state.apply(JobReleased(*held.key))
        assert held.job.id not in self.finished, "it ran twice"
        self.finished[held.job.id] = now

    def give_way(self, held: Holding, now: float) -> None:
        if held.parked or held.yielding != How.PARK:
            self.state.apply(JobReleased(*held.key))
            job = replace(held.job, attempt=held.attempt, queued_at=now, attained_s=held.attained_s(now))
            self.state.apply(JobQueued(job))
        else:
            self.state.apply(JobParked(*held.key, now))
        self.served[held.job.id] += 0.0 if held.parked else held.attained_s(now) - held.job.attained_s

    def _carry_out(self, decision: Decision, now: float) -> None:
        match decision:
            case Grant(job, placement, _):
                self.state.apply(JobGranted(job, job.attempt + 1, placement, now))
            case Resume(job_id, attempt, placement):
                job = self.state.facts.held[job_id, attempt].job
                self.state.apply(JobGranted(job, attempt, placement, now))
            case Yield(job_id, attempt, how, _):
                if not self.state.facts.held[job_id, attempt].parked:  # who only gives up being parked held no slots
                    self.displaced.append((now, job_id))
                self.state.apply(JobYielding(job_id, attempt, how))
                if not self.live:
                    self.give_way(self.state.facts.held[job_id, attempt], now)

    # The rules ----------------------------------------------------------------------------------------------------

    def _check(self, decisions: list[Decision], now: float) -> None:
        snapshot = self.state.snapshot()
        taken = Counter(slot for held in snapshot.held.values() if not held.parked for slot in slots(held.placement))
        assert max(taken.values(), default=0) <= 1, "a slot is held twice"
        for decision in decisions:
            match decision:
                case Grant(job, placement, shape):
                    assert shape in job.shapes
                    self._check_gang(job, placement, shape)
                    taken.update(slots(placement))
                case Resume(job_id, attempt, placement):
                    self._check_resumed(snapshot.held[job_id, attempt], placement)
                    taken.update(slots(placement))
                case Yield(job_id, attempt, how, _):
                    self._check_victim(snapshot.held[job_id, attempt], how, now)
        assert max(taken.values(), default=0) <= 1, "a slot was granted twice"
        self._check_limits(decisions)

    def _check_gang(self, job: Job, placement: Placement, shape: Shape) -> None:
        nodes = [self.state.facts.pools.nodes[name] for name in placement.nodes]
        wanted = shape.slots
        assert placement.slots == wanted, "a part of a gang"
        assert all(
            set(held) <= set(range(node.slots)) for node, held in zip(nodes, placement.nodes.values(), strict=True)
        )
        assert len(nodes) == -(-wanted // nodes[0].slots) <= shape.nodes, "more nodes than need be"
        assert len({(node.kind, node.slots, node.region, node.market) for node in nodes}) == 1
        assert sum(len(held) < nodes[0].slots for held in placement.nodes.values()) <= 1, "two parts of nodes"
        for node in nodes:
            assert not node.draining
            assert node.memory_gb >= shape.memory_gb
            assert not shape.kinds or any(matches(asked, node.kind) for asked in shape.kinds)
            assert job.region in ("", node.region)
            assert job.market in ("", node.market)

    def _check_resumed(self, held: Holding, placement: Placement) -> None:
        assert held.parked
        assert not held.yielding
        assert {name: len(own) for name, own in placement.nodes.items()} == {
            name: len(own) for name, own in held.placement.nodes.items()
        }
        kinds = {self.state.facts.pools.nodes[name].kind for name in placement.nodes}
        assert kinds == {"cpu"} or placement == held.placement, "other accelerators than its process has open"

    def _check_victim(self, held: Holding, how: How, now: float) -> None:
        nodes = [self.state.facts.pools.nodes.get(name) for name in held.placement.nodes]
        assert not held.yielding
        if any(node and node.draining for node in nodes) or held.parked:
            assert how == How.SUSPEND
            return
        assert held.job.yields
        assert now - held.since >= self.state.policy.min_run_s, "told to give way before its time"
        if how == How.PARK:
            for node in nodes:
                assert node is not None
                used = sum(
                    other.park_gb(node.name)
                    for other in self.state.facts.held.values()
                    if node.name in other.placement.nodes and (other.parked or other.yielding == How.PARK)
                )
                assert used + held.park_gb(node.name) <= node.park_gb + 0.01

    def _check_limits(self, decisions: list[Decision]) -> None:
        gained: Counter[str] = Counter()
        for decision in decisions:
            if isinstance(decision, Grant):
                gained[decision.job.tenant] += decision.placement.slots
            elif isinstance(decision, Resume):
                gained[self.state.facts.held[decision.job_id, decision.attempt].job.tenant] += decision.placement.slots
        have: Counter[str] = Counter()
        for one in self.state.snapshot().held.values():
            have[one.job.tenant] += 0 if one.parked else one.placement.slots
        for tenant, share in self.state.snapshot().tenants.items():
            if share.max_slots is not None and gained[tenant]:
                assert have[tenant] + gained[tenant] <= share.max_slots, "more than the tenant may hold"


def slots(placement: Placement) -> list[tuple[str, int]]:
    return [(name, slot) for name, held in placement.nodes.items() for slot in held]
