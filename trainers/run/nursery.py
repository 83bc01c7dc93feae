"""Training children of one node from before their workers are there: those of granted jobs run on at once, those of jobs that may
come next import and wait. Each has a keeper for a parent, so that the agent in which this runs may come and go."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.errors import HeliostatError
from cluster.ports import Attempt
from trainers.run.early import CHILD_GB, Early
from trainers.run.parts import AgentHandle, DriverSettings, WorkerTask
from trainers.run.ports import Assignment
from trainers.run.preparing import CPU, parts_of, stage

log = logging.getLogger(__name__)

PAGES_SHARE = 0.5
"""Of the memory that is available: a model that is larger would push out what others read."""


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
    """`cluster.ports.Children`. `command`: the arguments of the tenant's Python; None: the launcher of the task's method.

    `_lock` is held for moments only: reports and hints wait for it. What is slow is done outside, and looked at again."""

    command: Sequence[str] | None = None
    _expected: frozenset[Attempt] = frozenset()
    _ahead: dict[Attempt, Prepared] = field(default_factory=dict)
    _leaving: dict[Attempt, Early] = field(default_factory=dict)
    _begun: dict[Attempt, Early | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _starts: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._usual = os.getpriority(os.PRIO_PROCESS, 0)
        self._background = ThreadPoolExecutor(1, "ahead")

    # What was granted -----------------------------------------------------------------------------------------------

    def start(self, task: WorkerTask) -> str | None:
        """Tells a child its configuration; it runs on, and what it says waits for the worker. Once: Ray may repeat a call."""
        key = (task.job_id, task.attempt)
        with self._starts:
            with self._lock:
                begun = self._begun.get(key)
                if begun is not None and begun.lives:
                    return str(begun.folder)
                prepared = self._ahead.pop(key, None)
                self._begun = {one: early for one, early in self._begun.items() if early is not None and early.lives}
                self._begun[key] = None
            early = self._started(task, prepared)
            with self._lock:
                self._begun[key] = early
        return None if early is None else str(early.folder)

    def _started(self, task: WorkerTask, prepared: Prepared | None) -> Early | None:
        try:
            early = self._waiting_for(task, prepared) or Early(task, self.command, self._usual, waits=False)
            early.start(task.config)
        except (HeliostatError, OSError) as error:  # the worker meets the same, and says so
            log.warning("the child of %s was not started early: %s", task.mark, error)
            return None
        return early

    def _waiting_for(self, task: WorkerTask, prepared: Prepared | None) -> Early | None:
        early = None if prepared is None else prepared.early
        if early is None or early.suits(task):
            return early
        early.end()
        return None

    # What may come --------------------------------------------------------------------------------------------------

    def waiting(self) -> frozenset[Attempt]:
        """Those too that were let go and live on for a moment: nobody was granted them."""
        with self._lock:
            going = {key for key, early in self._leaving.items() if early.lives and key not in self._begun}
            return frozenset(self._ahead) | going

    def expect(self, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        with self._lock:
            self._expected = frozenset(attempts)
            gone = {key: self._ahead.pop(key) for key in self._ahead.keys() - self._expected}
            self._leaving = {key: early for key, early in self._leaving.items() if early.lives}
            self._leaving |= {key: one.early for key, one in gone.items() if one.early is not None}
            waiting = [prepared.early for prepared in self._ahead.values() if prepared.early is not None]
            unknown = [key for key in attempts if key not in self._ahead and key not in self._begun]
        for early in waiting:
            early.keep_waiting()
        for key, prepared in gone.items():
            if prepared.early is not None:
                prepared.early.end()
            self._background.submit(self._clear, key, prepared.agent)
        return unknown

    def _clear(self, key: Attempt, agent: AgentHandle) -> None:
        """Not what was named again meanwhile; the agent spares what was granted."""
        with self._lock:
            named_again = key in self._ahead
        if not named_again:
            agent.clear_ahead(*key)

    def prepare(self, coming: Coming, agent: AgentHandle) -> None:
        """Once, and only what is still expected: calls may come late or again."""
        key = coming.key
        with self._lock:
            if key in self._ahead or key in self._begun or key not in self._expected:
                return
            self._ahead[key] = prepared = Prepared(agent)
        self._background.submit(self._prepare, coming, prepared)

    def _prepare(self, coming: Coming, prepared: Prepared) -> None:
        if not self._is_ahead(coming.key, prepared):
            return
        agent = prepared.agent
        try:
            part, *_ = parts_of(coming.assignment)
            task = stage(coming.assignment, part, agent, coming.settings, lambda stage, seconds: None, ahead=True)
            read_ahead(Path(task.config["base_model"]))
            if coming.assignment.kind == CPU:  # elsewhere only the grant says which devices it may see
                self._start_waiting(coming.key, task, prepared, agent.report().node.park_gb)
        except (HeliostatError, OSError) as error:  # the driver meets the same, and says so
            log.info("nothing is ready for job %s attempt %d: %s", *coming.key, error)
        if not self._is_ahead(coming.key, prepared):
            agent.clear_ahead(*coming.key)

    def _is_ahead(self, key: Attempt, prepared: Prepared) -> bool:
        with self._lock:
            return self._ahead.get(key) is prepared

    def _start_waiting(self, key: Attempt, task: WorkerTask, prepared: Prepared, room_gb: float) -> None:
        """One at a time: by the background's only thread."""
        with self._lock:
            others = sum(one.early is not None for one in self._ahead.values())
        if (others + 1) * CHILD_GB > room_gb or not self._is_ahead(key, prepared):
            return
        early = Early(task, self.command, self._usual, waits=True)
        with self._lock:
            if self._ahead.get(key) is prepared:
                prepared.early = early
                return
            if key not in self._begun:
                self._leaving[key] = early
        early.end()  # granted or let go meanwhile


def read_ahead(model: Path) -> None:
    """Into the page cache, as far as there is room for it. Read: what the kernel is only advised to read it cuts short."""
    files = list(model.glob("*.safetensors"))
    if sum(file.stat().st_size for file in files) > psutil.virtual_memory().available * PAGES_SHARE:
        return
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        with file.open("rb", buffering=0) as weights:
            while weights.readinto(buffer):
                pass
