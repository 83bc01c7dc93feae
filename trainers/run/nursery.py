"""Training children of one node from before their workers are there: those of granted jobs run on at once, those of jobs that may
come next import and wait. Each has a keeper for a parent, so that the agent in which this runs may come and go."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import HeliostatError
from cluster.ports import Attempt
from trainers.run.early import CHILD_GB, Early
from trainers.run.parts import AgentHandle, DriverSettings, WorkerTask
from trainers.run.ports import Assignment
from trainers.run.preparing import CPU, stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coming:
    """A job that may come to this node, as the next attempt of it would find it."""

    assignment: Assignment
    settings: DriverSettings

    @property
    def key(self) -> Attempt:
        return self.assignment.job_id, self.assignment.attempt


@dataclass
class Prepared:
    """`early` None: its node is being made ready, or there is nothing to start yet."""

    agent: AgentHandle
    early: Early | None = None


@dataclass
class Nursery:
    """`cluster.ports.Children`. `command`: the arguments of the tenant's Python; None: the launcher of the task's method."""

    command: Sequence[str] | None = None
    _ahead: dict[Attempt, Prepared] = field(default_factory=dict)
    _begun: dict[Attempt, Early | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._background = ThreadPoolExecutor(1, "ahead")

    # What was granted -----------------------------------------------------------------------------------------------

    def start(self, task: WorkerTask) -> str | None:
        """Tells a child its configuration; it runs on, and what it says waits for the worker. Once: Ray may repeat a call."""
        key = (task.job_id, task.attempt)
        with self._lock:
            begun = self._begun.get(key)
            if begun is not None and begun.lives:
                return str(begun.folder)
            prepared, self._begun[key] = self._ahead.pop(key, None), None
            try:
                early = self._waiting_for(task, prepared) or Early(task, self.command, self._usual)
                early.start(task.config)
                self._begun[key] = early
            except (HeliostatError, OSError) as error:  # the worker meets the same, and says so
                log.warning("the child of %s was not started early: %s", task.mark, error)
                return None
        return str(early.folder)

    def _waiting_for(self, task: WorkerTask, prepared: Prepared | None) -> Early | None:
        early = None if prepared is None else prepared.early
        if early is None or early.suits(task):
            return early
        early.end()
        return None

    # What may come --------------------------------------------------------------------------------------------------

    def waiting(self) -> frozenset[Attempt]:
        """Asked with every report of the node, which must not wait for a child that is starting: without the lock."""
        return frozenset(self._ahead.copy())

    def expect(self, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        with self._lock:
            self._begun = {key: early for key, early in self._begun.items() if key in attempts}
            for key in self._ahead.keys() - set(attempts):
                self._let_go(key)
            for prepared in self._ahead.values():
                if prepared.early is not None:
                    prepared.early.keep_waiting()
            known: Collection[Attempt] = self._ahead.keys() | self._begun.keys()
            return [key for key in attempts if key not in known]

    def _let_go(self, key: Attempt) -> None:
        prepared = self._ahead.pop(key)
        if prepared.early is not None:
            prepared.early.end()
        self._background.submit(self._clear, key, prepared.agent)

    def _clear(self, key: Attempt, agent: AgentHandle) -> None:
        """Not what was named again, or granted, meanwhile."""
        with self._lock:
            if key not in self._ahead and key not in self._begun:
                agent.clear_attempt(*key)

    def prepare(self, coming: Coming, agent: AgentHandle) -> None:
        with self._lock:
            if coming.key not in self._begun:
                self._ahead[coming.key] = Prepared(agent)
                self._background.submit(self._prepare, coming, agent)

    def _prepare(self, coming: Coming, agent: AgentHandle) -> None:
        if coming.key not in self.waiting():
            return
        try:
            task = stage(coming.assignment, agent, coming.settings, lambda stage, seconds: None)
            read_ahead(Path(task.config["base_model"]))
            if coming.assignment.kind == CPU:  # elsewhere only the grant says which devices it may see
                self._start_waiting(coming.key, task, agent.report().node.park_gb)
        except (HeliostatError, OSError) as error:  # the driver meets the same, and says so
            log.info("nothing is ready for job %s attempt %d: %s", *coming.key, error)

    def _start_waiting(self, key: Attempt, task: WorkerTask, room_gb: float) -> None:
        with self._lock:
            prepared = self._ahead.get(key)
            others = sum(one.early is not None for one in self._ahead.values())
            if prepared is not None and prepared.early is None and (others + 1) * CHILD_GB <= room_gb:
                prepared.early = Early(task, self.command, self._usual)


def read_ahead(model: Path) -> None:
    """Into the page cache, as far as there is room for it."""
    for file in model.glob("*.safetensors"):
        with file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
