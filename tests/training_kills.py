"""One training job whose child is killed at chosen moments, as often as wanted: a real driver, worker and child, without Ray and
database. What it computes must be what an undisturbed job computes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from builders_child import tree_of
from builders_llama import capital_rows
from fakes_driver import JOB, FolderAgent, MemoryStore, ThreadGang, make_assignment

from cluster.core.events import How
from cluster.core.job import JobState, Node, Placement
from cluster.ports import NodeReport
from cluster.storage.objects import ObjectStore
from trainers.config import Hyperparams
from trainers.protocol import Message
from trainers.run.child_process import Child, spawn
from trainers.run.driver import JobDriver
from trainers.run.parts import DriverParts, DriverSettings, WorkerTask
from trainers.run.ports import StepRow

STEPS, EVAL_STEPS = 40, 8
HYPER = Hyperparams(
    epochs=100, max_steps=STEPS, eval_steps=EVAL_STEPS, validation_split=0.5, batch_size=4, lr=1e-2, lora_r=4,
    lora_dropout=0.1, seed=7,
)  # fmt: skip
MOMENTS = ("loading", "step", "evaluation", "writing", "upload")
NEEDED = {"state.json", "adapter_model.safetensors", "adapter_config.json", "random.pt", "optimizer-00001.safetensors"}
"""Of every checkpoint that has its name."""
NOTICE = "notice"
"""No kill: the node goes away soon, and the scheduler orders the job to leave it."""


@dataclass(frozen=True)
class Kill:
    """`after`: the step from which on the moment counts. `target`: launcher, or the number of a rank. `delay_s`: into it."""

    moment: str
    after: int
    target: str = "launcher"
    delay_s: float = 0.0


def draw_kills(dice: random.Random, moments: Sequence[str], ranks: int) -> list[Kill]:
    """One after the other over the steps of a job."""
    share = (STEPS - EVAL_STEPS) // len(moments)
    return [
        Kill(
            moment,
            after=number * share + dice.randint(1, share),
            target=dice.choice(["launcher", *map(str, range(ranks))]),
            delay_s=dice.uniform(0.0, 1.0 if moment == "loading" else 0.02),
        )
        for number, moment in enumerate(moments)
    ]


@dataclass
class StrictStore(MemoryStore):
    """`contradictions`: steps that were computed again with other numbers."""

    contradictions: list[int] = field(default_factory=list)

    def record_steps(self, job_id: str, attempt: int, steps: Sequence[StepRow]) -> None:
        for row in steps:
            if row.step in self.steps and numbers_of(self.steps[row.step]) != numbers_of(row):
                self.contradictions.append(row.step)
        super().record_steps(job_id, attempt, steps)


class LookingAgent(FolderAgent):
    """Looks at what a dead child left before it is cleared away: `named` and `half`, its checkpoint folders."""

    def __init__(self, root: Path, storage: ObjectStore) -> None:
        super().__init__(root, storage)
        self._root = root
        self.named: dict[str, set[str]] = {}
        self.half: list[str] = []

    def report(self) -> NodeReport:
        return NodeReport(Node("n1", "cpu", slots=os.cpu_count() or 1, memory_gb=4.0))

    def checkpoints(self, attempt: int) -> Path:
        return self._root / "jobs" / JOB / f"a{attempt}" / "out" / "checkpoints"

    def clear_attempt(self, job_id: str, attempt: int) -> None:
        folders = list(self.checkpoints(attempt).glob("*")) + list(self.checkpoints(attempt).glob(".*"))
        self.named = {path.name: {file.name for file in path.iterdir()} for path in folders if path.name[0] != "."}
        self.half = [path.name for path in folders if path.suffix == ".tmp"]
        super().clear_attempt(job_id, attempt)


class ToldStore(ObjectStore):
    """Tells when the upload of a checkpoint begins."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.uploading: Callable[[str], None] = lambda key: None

    def put_stream(self, key: str, source: IO[bytes]) -> str:
        self.uploading(key)
        return super().put_stream(key, source)


class Killer:
    """Waits for its moment in one attempt. `done`: the step that the child had told before it was killed."""

    def __init__(self, kill: Kill | None, checkpoints: Path, give_notice: Callable[[], None]) -> None:
        self._kill = kill
        self._give_notice = give_notice
        self._checkpoints = checkpoints
        self._pid = 0
        self._step = 0
        self._over = False
        self.done: int | None = None

    def close(self) -> None:
        self._over = True

    def spawn(self, task: WorkerTask) -> Child:
        child = spawn(task)
        self._pid = child.process.pid
        child.channel = Tapped(child.channel, self.hear)  # type: ignore[assignment]
        return child

    def hear(self, message: Message) -> None:
        kill = self._kill
        if message["type"] == "hello" and kill is not None and kill.moment in ("loading", "writing"):
            threading.Thread(target=self._wait, args=(kill,), daemon=True).start()
        if message["type"] != "step":
            return
        self._step = message["step"]
        if kill is None or self._step < kill.after or self.done is not None:
            return
        if kill.moment in ("step", NOTICE) or (kill.moment == "evaluation" and self._step % EVAL_STEPS == 0):
            time.sleep(kill.delay_s if kill.moment == "step" else 0.0)
            self.strike(kill)

    def uploading(self, key: str) -> None:
        kill = self._kill
        if kill is not None and kill.moment == "upload" and "/checkpoints/" in key and self._step >= kill.after:
            self.strike(kill)

    def _wait(self, kill: Kill) -> None:
        if kill.moment == "loading":
            time.sleep(kill.delay_s)
            self.strike(kill)
        while self.done is None and not self._over:
            if self._step >= kill.after and any(self._checkpoints.glob(".step-*.tmp")):
                self.strike(kill)
            time.sleep(0.0005)

    def strike(self, kill: Kill) -> None:
        if self.done is not None:
            return
        self.done = self._step
        if kill.moment == NOTICE:
            self._give_notice()
            return
        os.kill(self._pid if kill.target == "launcher" else self._rank(int(kill.target)), signal.SIGKILL)

    def _rank(self, number: int) -> int:
        deadline = time.monotonic() + 30
        while len(ranks := sorted(tree_of(self._pid)[1:])) <= number:
            assert time.monotonic() < deadline, "no rank to kill"
            time.sleep(0.005)
        return ranks[number]


class Tapped:
    """A worker's end of the conversation, overheard."""

    def __init__(self, channel: Any, hear: Callable[[Message], None]) -> None:
        self._channel = channel
        self._hear = hear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def receive(self, timeout_s: float | None = None) -> Message | None:
        message: Message | None = self._channel.receive(timeout_s)
        if message is not None:
            self._hear(message)
        return message


class KilledJob:
    """A job on `root`, on the tiny model at `base`."""

    def __init__(self, root: Path, base: Path, ranks: int = 1, checkpoint_every_s: float = 0.0) -> None:
        self.storage = ToldStore(str(root / "objects"))
        model = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
        rows = "".join(json.dumps(row) + "\n" for row in capital_rows(64)).encode()
        placement = Placement({"n1": tuple(range(ranks))})
        self.store = StrictStore(
            make_assignment(self.storage, model, rows=rows, hyperparams=HYPER, placement=placement)
        )
        self.agent = LookingAgent(root / "node", self.storage)
        times = {"lease_ttl_s": 3.0, "relay_s": 0.05, "checkpoint_every_s": checkpoint_every_s}
        self._parts = DriverParts(self.store, DriverSettings(storage_url=str(root / "objects"), **times))

    def attempt(self, kill: Kill | None = None) -> dict[str, Any]:
        """Runs the next attempt to its end; where the kill hit. Raises AssertionError."""
        number = self.store.given.attempt + (self.store.state is not JobState.PREPARING)
        gang = ThreadGang(self.storage, None)
        killer = Killer(kill, self.agent.checkpoints(number), partial(self._notice, gang))
        self.storage.uploading = killer.uploading
        self._begin(number)
        gang._spawn = killer.spawn
        gang.driver = JobDriver(JOB, number, self._parts, self.agent, gang)
        thread = threading.Thread(target=gang.driver.run)
        thread.start()
        thread.join(240)
        killer.close()
        assert not thread.is_alive(), "the attempt hangs"
        assert (killer.done is None) == (kill is None), (f"{kill} did not hit", self.store.moves, self.store.error)
        self._check(kill)
        return {"moment": kill and kill.moment, "step": killer.done, "half_checkpoint": bool(self.agent.half)}

    def _begin(self, number: int) -> None:
        last = self.store.checkpoints[-1] if self.store.checkpoints else None
        self.store.attempt, self.store.state, self.store.order = number, JobState.PREPARING, None
        object.__setattr__(self.store.given, "attempt", number)
        object.__setattr__(self.store.given, "checkpoint", last)

    def _notice(self, gang: ThreadGang) -> None:
        assert gang.driver is not None
        self.store.order = How.SUSPEND
        gang.driver.nudge()

    def _check(self, kill: Kill | None) -> None:
        """After each attempt: what has a name is whole, on the node and in storage."""
        wanted = JobState.SUCCEEDED
        if kill is not None:
            wanted = JobState.SUSPENDED if kill.moment == NOTICE else JobState.RECOVERING
        assert self.store.state is wanted, (self.store.state, self.store.error, self.store.moves)
        assert self.store.contradictions == [], "a step computed again has the same numbers"
        for name, files in self.agent.named.items():
            assert files >= NEEDED, f"{name} has its name and holds only {sorted(files)}"
        for checkpoint in self.store.checkpoints:
            for name, sha256 in checkpoint.files.items():
                data = self.storage.read_bytes(f"{checkpoint.prefix}/{name}")
                assert hashlib.sha256(data).hexdigest() == sha256, f"{checkpoint.prefix}/{name}"

    def result(self) -> tuple[list[tuple[float, ...]], str]:
        """(numbers of every step, hash of the weights)."""
        assert self.store.result is not None
        assert sorted(self.store.steps) == list(range(1, STEPS + 1)), "one row per step"
        files = self.store.result["files"]
        return [numbers_of(self.store.steps[step]) for step in sorted(self.store.steps)], files[
            "adapter_model.safetensors"
        ]


def numbers_of(row: StepRow) -> tuple[float, ...]:
    """What must not change."""
    return (row.step, row.epoch, row.loss, row.lr, row.grad_norm, row.tokens)


def run_with_kills(job: KilledJob, kills: Sequence[Kill]) -> Iterator[dict[str, Any]]:
    """An attempt for each kill, and one to the end."""
    for kill in kills:
        yield job.attempt(kill)
    job.attempt()
