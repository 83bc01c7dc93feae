"""The scheduler's ports in memory, with the rules of the real store: compare-and-set, epochs, no slot twice. The store can
keep itself in a file, so that an actor which is killed finds it again."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from cluster.core.events import Grant, How, Resume, Yield
from cluster.core.job import ACTIVE, Job, JobState, Node, Placement, TenantShare
from cluster.errors import EnvironmentError_, Fenced, HeliostatError, Unavailable
from cluster.ports import (
    ActiveJob,
    Attempt,
    CheckedEnvironment,
    NodeReport,
    PreparedEnvironment,
    Rows,
    Shares,
    StagedModel,
)


class ManualClock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Facts:
    """The rows. `leases` are open ones."""

    epoch: int = 0
    jobs: dict[str, Job] = field(default_factory=dict)
    states: dict[str, JobState] = field(default_factory=dict)
    leases: dict[Attempt, tuple[Placement, float]] = field(default_factory=dict)
    progress: dict[str, float] = field(default_factory=dict)
    nodes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    parked: set[Attempt] = field(default_factory=set)
    orders: dict[Attempt, How] = field(default_factory=dict)
    ordered_at: dict[Attempt, float] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    tenants: dict[str, TenantShare] = field(default_factory=dict)
    draining: frozenset[str] = frozenset()

    def taken(self) -> set[tuple[str, int]]:
        held = (lease for key, (lease, _) in self.leases.items() if key not in self.parked)
        return {slot for lease in held for slot in _slots(lease)}


class MemoryStore:
    """`cluster.ports.SchedulerStore`. `down`: what it raises while the database is away."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.facts = Facts()
        self.down: Unavailable | None = None
        self.looks: list[frozenset[str] | None] = []

    # What a test does in the name of others.
    def queue(self, job: Job) -> None:
        with self._facts() as facts:
            facts.jobs[job.id] = job
            facts.states[job.id] = JobState.QUEUED

    def move(self, job_id: str, then: JobState) -> None:
        with self._facts() as facts:
            facts.states[job_id] = then
            facts.since[job_id] = self.clock()

    def renew(self, job_id: str, ttl_s: float) -> None:
        with self._facts() as facts:
            key = (job_id, facts.jobs[job_id].attempt)
            facts.leases[key] = (facts.leases[key][0], self.clock() + ttl_s)
            facts.progress[job_id] = self.clock()

    def park(self, job_id: str) -> None:
        """As a driver that was told to."""
        with self._facts() as facts:
            key = (job_id, facts.jobs[job_id].attempt)
            facts.states[job_id] = JobState.PARKED
            facts.parked.add(key)
            facts.orders.pop(key, None)
            facts.since[job_id] = self.clock()

    # The port.
    def take_epoch(self) -> int:
        with self._facts() as facts:
            facts.epoch += 1
            return facts.epoch

    def rows(self, ids: Collection[str] | None = None, shares: bool = True) -> Rows:
        with self._facts() as facts:
            asked = set(facts.jobs if ids is None else ids)
            held = {job_id for job_id, _ in facts.leases}
            waiting = [
                job
                for id, job in facts.jobs.items()
                if id in asked - held and facts.states[id] in (JobState.QUEUED, JobState.SUSPENDED)
            ]
            active = [one for one in _active(facts) if one.id in asked]
            self.looks.append(ids if ids is None else frozenset(ids))
            return Rows(self.clock(), waiting, active, Shares(dict(facts.tenants), facts.draining) if shares else None)

    def grant(self, epoch: int, grants: Sequence[Grant], ttl_s: float) -> dict[str, int]:
        with self._facts(epoch) as facts:
            made = {one.job.id: self._grant(facts, one, ttl_s) for one in grants}
            return {job_id: attempt for job_id, attempt in made.items() if attempt is not None}

    def _grant(self, facts: Facts, grant: Grant, ttl_s: float) -> int | None:
        id, placement = grant.job.id, grant.placement
        if facts.states[id] not in (JobState.QUEUED, JobState.SUSPENDED):
            return None
        assert not _slots(placement) & facts.taken(), f"{grant} takes what is held"
        attempt = facts.jobs[id].attempt + 1
        facts.jobs[id] = replace(facts.jobs[id], attempt=attempt)
        facts.states[id] = JobState.PREPARING
        facts.leases[id, attempt] = (placement, self.clock() + ttl_s)
        facts.progress[id] = facts.since[id] = self.clock()
        return attempt

    def order(self, epoch: int, yields: Sequence[Yield]) -> list[Attempt]:
        with self._facts(epoch) as facts:
            told = []
            for one in yields:
                key = (one.job_id, one.attempt)
                if key in facts.leases and facts.states[one.job_id] in ACTIVE and facts.orders.get(key) != one.how:
                    facts.orders[key] = one.how
                    facts.ordered_at[key] = self.clock()
                    told.append(key)
            return told

    def resume(self, epoch: int, resumes: Sequence[Resume]) -> list[Attempt]:
        with self._facts(epoch) as facts:
            done = []
            for one in resumes:
                key = (one.job_id, one.attempt)
                if facts.states[one.job_id] == JobState.PARKED and not _slots(one.placement) & facts.taken():
                    facts.states[one.job_id] = JobState.RUNNING
                    facts.parked.discard(key)
                    facts.leases[key] = (one.placement, facts.leases[key][1])
                    facts.since[one.job_id] = self.clock()
                    done.append(key)
            return done

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        with self._facts(epoch) as facts:
            if facts.states[job_id] not in ACTIVE or facts.jobs[job_id].attempt != attempt:
                return False
            facts.states[job_id] = JobState.RECOVERING
            facts.reasons.append(reason)
            return True

    def release(self, epoch: int, attempts: Sequence[Attempt]) -> None:
        with self._facts(epoch) as facts:
            for key in attempts:
                facts.leases.pop(key, None)
                facts.orders.pop(key, None)
                facts.parked.discard(key)
                if facts.states[key[0]] == JobState.RECOVERING:
                    facts.states[key[0]] = JobState.QUEUED

    def report_nodes(self, epoch: int, reports: Sequence[NodeReport]) -> None:
        with self._facts(epoch) as facts:
            facts.nodes = sorted(report.node.name for report in reports)

    def wait_for_change(self, timeout_s: float) -> None:
        """None: look at everything."""
        time.sleep(min(timeout_s, 0.05))

    @contextmanager
    def _facts(self, epoch: int | None = None) -> Iterator[Facts]:
        if self.down is not None:
            raise self.down
        if epoch is not None and epoch != self.facts.epoch:
            raise Fenced(f"epoch {epoch} is over, {self.facts.epoch} rules")
        yield self.facts


class FileStore(MemoryStore):
    """The same rows in a file, shared by processes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @contextmanager
    def _facts(self, epoch: int | None = None) -> Iterator[Facts]:
        with FileLock(f"{self._path}.lock"):
            if self._path.exists():
                self.facts = pickle.loads(self._path.read_bytes())
            with super()._facts(epoch) as facts:
                yield facts
            aside = self._path.with_suffix(".new")
            aside.write_bytes(pickle.dumps(facts))
            aside.rename(self._path)

    def look(self) -> Facts:
        with self._facts() as facts:
            return facts


def _slots(placement: Placement) -> set[tuple[str, int]]:
    return {(node, slot) for node, slots in placement.nodes.items() for slot in slots}


def _active(facts: Facts) -> Iterator[ActiveJob]:
    for id, job in facts.jobs.items():
        key, state = (id, job.attempt), facts.states[id]
        lease, expires_at = facts.leases.get(key, (None, 0.0))
        if lease is not None or state in ACTIVE or state == JobState.RECOVERING:
            yield ActiveJob(
                job=job,
                state=state,
                attempt=job.attempt,
                lease=lease,
                lease_expires_at=expires_at,
                progress_at=facts.progress.get(id, 0.0),
                since=facts.since.get(id, 0.0),
                parked=key in facts.parked,
                order=facts.orders.get(key),
                ordered_at=facts.ordered_at.get(key, 0.0),
            )


class FakeDrivers:
    """`cluster.ports.DriverLauncher`: drivers are entries of a set. `refuse`: jobs whose driver cannot be started."""

    def __init__(self) -> None:
        self.living: set[Attempt] = set()
        self.slow: set[Attempt] = set()
        self.started: list[Attempt] = []
        self.ended: list[Attempt] = []
        self.nudged: list[Attempt] = []
        self.refuse: dict[str, HeliostatError] = {}

    def start(self, job_id: str, attempt: int) -> None:
        if job_id in self.refuse:
            raise self.refuse[job_id]
        self.started.append((job_id, attempt))
        self.living.add((job_id, attempt))

    def alive(self, job_id: str, attempt: int) -> bool | None:
        return None if (job_id, attempt) in self.slow else (job_id, attempt) in self.living

    def nudge(self, job_id: str, attempt: int) -> None:
        self.nudged.append((job_id, attempt))

    def end(self, job_id: str, attempt: int) -> None:
        self.ended.append((job_id, attempt))
        self.living.discard((job_id, attempt))


class FakeNodes:
    """`cluster.ports.Nodes`. `immortal`: attempts whose processes do not die; `silent`: nodes that do not answer."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.silent: set[str] = set()
        self.immortal: set[Attempt] = set()
        self.running: dict[str, set[Attempt]] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.expected: dict[str, list[Attempt]] = {}
        self.prepared: list[tuple[str, object]] = []
        self._lock = threading.Lock()

    def expect(self, node: str, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        unknown = [one for one in attempts if one not in self.expected.get(node, ())]
        self.expected[node] = list(attempts)
        return unknown

    def stage_ahead(self, node: str, model: StagedModel) -> None:
        with self._lock:  # two models may come to a node at a time
            self.nodes[node] = replace(self.nodes[node], models=self.nodes[node].models | {model.sha256})

    def prepare_ahead(self, node: str, coming: object) -> None:
        self.prepared.append((node, coming))

    def reports(self) -> Sequence[NodeReport]:
        return [
            NodeReport(node, frozenset(self.running.get(name, set())))
            for name, node in self.nodes.items()
            if name not in self.silent
        ]

    def end_attempt(self, node: str, job_id: str, attempt: int) -> bool | None:
        self.asked.append((node, job_id, attempt))
        if node in self.silent or node not in self.nodes:
            return None
        if (job_id, attempt) in self.immortal:
            return False
        self.running.get(node, set()).discard((job_id, attempt))
        return True


class NoEnvironments:
    """`cluster.ports.EnvironmentStore` of a node that has one environment and makes others out of nothing; `broken` cannot be
    checked."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def materialize(self, lock: dict[str, object]) -> PreparedEnvironment:
        fingerprint = str(lock["fingerprint"])
        return PreparedEnvironment(fingerprint, self._root / fingerprint, self._root / fingerprint / "bin/python")

    def fingerprint(self, lock: dict[str, object]) -> str:
        return str(lock["fingerprint"])

    def ready(self) -> frozenset[str]:
        return frozenset({"base"})

    def check(self, fingerprint: str, *, repair: bool) -> CheckedEnvironment | None:
        if fingerprint == "broken":
            raise EnvironmentError_("it was killed", code="environment_check_failed", hint="try again")
        return CheckedEnvironment(("lib/a.py",), repair, ("base",)) if fingerprint == "base" else None


def pid_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
