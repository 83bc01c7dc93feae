"""The scheduler's ports in memory, with the rules of the real store: compare-and-set, epochs, no slot twice. The store can
keep itself in a file, so that an actor which is killed finds it again."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from filelock import FileLock

from cluster.core.job import ACTIVE, Job, JobState, Node, Placement
from cluster.errors import Fenced, HeliostatError, Unavailable
from cluster.ports import ActiveJob, NodeReport, PreparedEnvironment, Rows

Attempt = tuple[str, int]


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


class MemoryStore:
    """`cluster.ports.SchedulerStore`. `down`: what it raises while the database is away."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.facts = Facts()
        self.down: Unavailable | None = None

    # What a test does in the name of others.
    def queue(self, job: Job) -> None:
        with self._facts() as facts:
            facts.jobs[job.id] = job
            facts.states[job.id] = JobState.QUEUED

    def move(self, job_id: str, then: JobState) -> None:
        with self._facts() as facts:
            facts.states[job_id] = then

    def renew(self, job_id: str, ttl_s: float) -> None:
        with self._facts() as facts:
            key = (job_id, facts.jobs[job_id].attempt)
            facts.leases[key] = (facts.leases[key][0], self.clock() + ttl_s)
            facts.progress[job_id] = self.clock()

    # The port.
    def take_epoch(self) -> int:
        with self._facts() as facts:
            facts.epoch += 1
            return facts.epoch

    def rows(self) -> Rows:
        with self._facts() as facts:
            waiting = [job for id, job in facts.jobs.items() if facts.states[id] == JobState.QUEUED]
            return Rows(self.clock(), waiting, list(_active(facts)))

    def grant(self, epoch: int, job: Job, placement: Placement, ttl_s: float) -> int | None:
        with self._facts(epoch) as facts:
            if facts.states[job.id] != JobState.QUEUED:
                return None
            assert not _slots(placement) & {slot for lease, _ in facts.leases.values() for slot in _slots(lease)}
            attempt = facts.jobs[job.id].attempt + 1
            facts.jobs[job.id] = replace(facts.jobs[job.id], attempt=attempt)
            facts.states[job.id] = JobState.PREPARING
            facts.leases[job.id, attempt] = (placement, self.clock() + ttl_s)
            facts.progress[job.id] = self.clock()
            return attempt

    def mark_recovering(self, epoch: int, job_id: str, attempt: int, reason: str) -> bool:
        with self._facts(epoch) as facts:
            if facts.states[job_id] not in ACTIVE or facts.jobs[job_id].attempt != attempt:
                return False
            facts.states[job_id] = JobState.RECOVERING
            facts.reasons.append(reason)
            return True

    def release(self, epoch: int, job_id: str, attempt: int) -> None:
        with self._facts(epoch) as facts:
            facts.leases.pop((job_id, attempt), None)
            if facts.states[job_id] == JobState.RECOVERING:
                facts.states[job_id] = JobState.QUEUED

    def report_nodes(self, epoch: int, nodes: Sequence[Node]) -> None:
        with self._facts(epoch) as facts:
            facts.nodes = sorted(node.name for node in nodes)

    def wait_for_change(self, timeout_s: float) -> None:
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
        lease, expires_at = facts.leases.get((id, job.attempt), (None, 0.0))
        state = facts.states[id]
        if lease is not None or state in ACTIVE or state == JobState.RECOVERING:
            yield ActiveJob(id, job.tenant, state, job.attempt, lease, expires_at, facts.progress.get(id, 0.0))


class FakeDrivers:
    """`cluster.ports.DriverLauncher`: drivers are entries of a set. `refuse`: jobs whose driver cannot be started."""

    def __init__(self) -> None:
        self.living: set[Attempt] = set()
        self.slow: set[Attempt] = set()
        self.started: list[Attempt] = []
        self.ended: list[Attempt] = []
        self.refuse: dict[str, HeliostatError] = {}

    def start(self, job_id: str, attempt: int) -> None:
        if job_id in self.refuse:
            raise self.refuse[job_id]
        self.started.append((job_id, attempt))
        self.living.add((job_id, attempt))

    def alive(self, job_id: str, attempt: int) -> bool | None:
        return None if (job_id, attempt) in self.slow else (job_id, attempt) in self.living

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
    """`cluster.ports.EnvironmentStore` of a node that has one environment and makes others out of nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def materialize(self, lock: dict[str, object]) -> PreparedEnvironment:
        fingerprint = str(lock["fingerprint"])
        return PreparedEnvironment(fingerprint, self._root / fingerprint, self._root / fingerprint / "bin/python")

    def ready(self) -> frozenset[str]:
        return frozenset({"base"})


def pid_is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
