"""A driver's surroundings without Ray and database: a store in memory, a node agent on a folder, a worker group of threads."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from waiting import PATIENCE_S

from cluster.core.events import How
from cluster.core.job import JobState, Node, Placement, Wish, may_follow
from cluster.errors import Fenced, Unavailable
from cluster.ports import NodeReport
from cluster.staging import Staging
from cluster.storage.objects import ObjectStore, folder_sha256
from trainers.config import Hyperparams
from trainers.run.child_process import spawn
from trainers.run.driver import JobDriver
from trainers.run.nursery import Nursery
from trainers.run.parts import (
    AgentHandle,
    DriverParts,
    DriverSettings,
    GangRequest,
    Order,
    Record,
    WorkersLost,
    WorkerTask,
)
from trainers.run.ports import Allowance, Assignment, Heartbeat, LastCheckpoint, StepRow
from trainers.run.worker import Worker

ENVIRONMENT = "f" * 64


@dataclass
class MemoryStore:
    """`trainers.run.ports.DriverStore`; `down` and `attempt` may be changed by a test. While `lock` is held no event is written."""

    lock: ClassVar[AbstractContextManager[bool]] = (
        threading.RLock()
    )  # not the instance's: that one is sent to other processes
    given: Assignment
    state: JobState = JobState.PREPARING
    wish: Wish = Wish.RUN
    down: bool = False
    attempt: int = 1
    events: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    steps: dict[int, StepRow] = field(default_factory=dict)
    checkpoints: list[LastCheckpoint] = field(default_factory=list)
    keeps: int | None = None
    moves: list[tuple[JobState, str]] = field(default_factory=list)
    error: dict[str, str | None] | None = None
    result: dict[str, Any] | None = None
    heartbeats: int = 0
    order: How | None = None
    """The scheduler's, as the lease holds it."""
    freed: int = 0
    allowed: Allowance | None = None
    on_checkpoint: Callable[[], None] = lambda: None
    refuses: dict[str, Exception] = field(default_factory=dict)
    """Method → what it raises, whenever it is asked."""

    def _check(self, attempt: int, method: str = "") -> None:
        if self.down:
            raise Unavailable("the database is down")
        if method in self.refuses:
            raise self.refuses[method]
        if attempt != self.attempt:
            raise Fenced("another attempt owns the job")

    def assignment(self, job_id: str, attempt: int) -> Assignment:
        self._check(attempt)
        return self.given

    def upcoming(self, job_id: str, attempt: int, node: Node) -> Assignment:
        self._check(attempt - 1)
        return replace(self.given, attempt=attempt, placement=Placement({node.name: (0,)}), kind=node.kind)

    def heartbeat(self, job_id: str, attempt: int, ttl_s: float) -> Heartbeat:
        if self.down:
            raise Unavailable("the database is down")
        self.heartbeats += 1
        return Heartbeat(self.wish, attempt != self.attempt, self.order, self.state is JobState.PARKED)

    def move(
        self, job_id: str, attempt: int, then: JobState, *, reason: str, error: dict[str, str | None] | None = None
    ) -> bool:
        self._check(attempt)
        if not may_follow(self.state, then):
            return False
        self.state, self.error = then, error
        self.moves.append((then, reason))
        return True

    def allowance(self, job_id: str, attempt: int) -> Allowance | None:
        return self.allowed

    def park(self, job_id: str, attempt: int) -> bool:
        self._check(attempt)
        if self.state is JobState.RUNNING and self.order is How.PARK:
            self.freed += 1  # before who waits for the state looks
            self.state, self.order = JobState.PARKED, None
        return self.state is JobState.PARKED

    def event(
        self,
        job_id: str,
        attempt: int,
        type: str,
        message: str,
        *,
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        with self.lock:
            self._check(attempt)
            self.events.append((type, message, data or {}))

    def record_steps(self, job_id: str, attempt: int, steps: Sequence[StepRow]) -> None:
        self._check(attempt, "record_steps")
        self.steps |= {row.step: row for row in steps}

    def commit_checkpoint(
        self, job_id: str, attempt: int, step: int, prefix: str, files: dict[str, str], metrics: dict[str, Any]
    ) -> list[str]:
        self._check(attempt)
        self.checkpoints.append(LastCheckpoint(step, attempt, prefix, files))
        self.on_checkpoint()
        return [one.prefix for one in self.checkpoints[: -self.keeps]] if self.keeps else []

    def finish(
        self,
        job_id: str,
        attempt: int,
        prefix: str,
        files: dict[str, str],
        metrics: dict[str, Any],
        lineage: dict[str, Any],
    ) -> str:
        self._check(attempt, "finish")
        assert self.state is JobState.ARCHIVING
        self.state = JobState.SUCCEEDED
        self.result = {"prefix": prefix, "files": files, "metrics": metrics, "lineage": lineage}
        return "tuned@1"

    def stages(self) -> list[str]:
        return [data["stage"] for type, _, data in self.events if type == "stage"]


class FolderAgent:
    """`AgentHandle` and, for every node, `Agents`; real staging, and this Python as each environment."""

    def __init__(self, root: Path, storage: ObjectStore, children: Nursery | None = None) -> None:
        self._staging = Staging(root, storage)
        self.fails: Exception | None = None
        self.cleared: list[tuple[str, int]] = []
        self.hold = threading.Event()
        self.hold.set()
        self.children = children
        self.cpus = os.cpu_count() or 1

    def of(self, node: str) -> AgentHandle:
        return self

    def report(self) -> NodeReport:
        node = Node("n1", "cpu", slots=1, memory_gb=4.0, models=self._staging.models(), park_gb=4.0)
        return NodeReport(node, cpus=self.cpus)

    def prepare_environment(self, lock: dict[str, Any]) -> dict[str, Any]:
        self.hold.wait(PATIENCE_S)
        if self.fails:
            raise self.fails
        return {"fingerprint": ENVIRONMENT, "prefix": sys.prefix, "python": sys.executable}

    def stage_model(self, prefix: str, sha256: str, files: dict[str, str] | None = None) -> str:
        return str(self._staging.stage_model(prefix, sha256, files))

    def stage_attempt(
        self, job_id: str, attempt: int, files: dict[str, tuple[str, str]], *, ahead: bool = False
    ) -> str:
        return str(self._staging.stage_attempt(job_id, attempt, files, ahead=ahead))

    def start_child(self, task: WorkerTask) -> str | None:
        return None if self.children is None else self.children.start(task)

    def meeting_point(self) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def clear_ahead(self, job_id: str, attempt: int) -> None:
        self.cleared.append((job_id, attempt))
        self._staging.clear_ahead(job_id, attempt)

    def clear_attempt(self, job_id: str, attempt: int) -> None:
        self.cleared.append((job_id, attempt))
        self._staging.clear_attempt(job_id, attempt)


@dataclass
class NodeHandle:
    """`DriverHandle` of one node."""

    driver: JobDriver
    node: str

    def task(self) -> WorkerTask:
        return self.driver.task(self.node)

    def relay(self, records: list[Record]) -> list[Order]:
        return self.driver.relay(self.node, records)


class ThreadGang:
    """`Gang` with the real workers in threads of this process and real children; `script` None: the real launcher."""

    def __init__(self, storage: ObjectStore, script: Path | None) -> None:
        self._storage = storage
        self._spawn = spawn if script is None else partial(spawn, command=(str(script),))
        self.driver: JobDriver | None = None
        self.fails: str | None = None
        self.ended = 0

    def run(self, request: GangRequest) -> None:
        if self.fails:
            raise WorkersLost(self.fails)
        assert self.driver is not None
        handles = [NodeHandle(self.driver, node) for node in request.nodes]
        threads = [threading.Thread(target=self._work, args=(handle,)) for handle in handles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, handle: NodeHandle) -> None:
        Worker(handle.task(), handle, self._storage, self._spawn).run()

    def end(self) -> None:
        self.ended += 1


@dataclass
class World:
    """One job's driver with all that it needs, on `root`."""

    store: MemoryStore
    agent: FolderAgent
    gang: ThreadGang
    driver: JobDriver
    storage: ObjectStore
    root: Path


JOB = f"ftjob-{os.getpid()}"
"""Tests that run side by side look for their own processes."""


def make_assignment(storage: ObjectStore, model: dict[str, bytes] | None = None, **changes: Any) -> Assignment:
    """A job of tenant `t1` whose model and rows lie in storage."""
    model = model or {"config.json": b"{}"}
    files = {name: storage.put_bytes(f"base/m/{name}", data) for name, data in model.items()}
    storage.put_bytes("base/m/manifest.json", json.dumps(files).encode())
    rows = storage.put_bytes("tenants/t1/datasets/d/rows.jsonl", changes.pop("rows", b'{"text":"hello"}\n'))
    plain = Assignment(
        job_id=JOB,
        tenant="t1",
        attempt=1,
        placement=Placement({"n1": (0,)}),
        kind="cpu",
        method="sft",
        training_type="lora",
        task="causal_lm",
        hyperparams=Hyperparams(),
        precision="fp32",
        memory_limit_gb=None,
        base_model_name="m",
        base_model_prefix="base/m",
        base_model_sha256=folder_sha256(files),
        adapter_prefix=None,
        dataset_key="tenants/t1/datasets/d/rows.jsonl",
        dataset_sha256=rows,
        validation_key=None,
        validation_sha256=None,
        lock={},
        fingerprint=ENVIRONMENT,
        checkpoint=None,
        output_model="tuned",
        max_runtime_s=None,
        ran_s=0.0,
    )
    return replace(plain, **changes)


def make_world(root: Path, script: Path | None, settings: dict[str, Any] | None = None, **changes: Any) -> World:
    storage = ObjectStore(str(root / "objects"))
    store = MemoryStore(make_assignment(storage, **changes))
    agent, gang = FolderAgent(root / "node", storage), ThreadGang(storage, script)
    times = {"lease_ttl_s": 0.3, "relay_s": 0.05, "checkpoint_every_s": 0.0} | (settings or {})
    parts = DriverParts(store, DriverSettings(storage_url=str(root / "objects"), **times))
    gang.driver = driver = JobDriver(JOB, 1, parts, agent, gang)
    return World(store, agent, gang, driver, storage, root)
