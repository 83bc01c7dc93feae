"""What an attempt's worker says, turned into writes, orders and an outcome. No Ray, no threads of its own."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cluster.core.job import JobState
from cluster.errors import JobFailure
from trainers.protocol import signal_name
from trainers.run.limits import max_runtime_outcome
from trainers.run.parts import Order, Outcome, Record
from trainers.run.ports import DriverStore, StepRow
from trainers.run.records import RecordWriter

LEVELS = ("info", "warning", "error")
MAX_WAITING_ORDERS = 1000
PROGRESS_S = 30.0
"""Between two events of the same long pass."""


class Intent(StrEnum):
    """Why the driver stops a healthy child."""

    CANCEL = "cancel"
    PAUSE = "pause"
    LIMIT = "limit"
    SUSPEND = "suspend"

    @property
    def rank(self) -> int:
        """What the tenant wants overtakes what the scheduler wants, and a cancel overtakes everything."""
        return {Intent.CANCEL: 3, Intent.SUSPEND: 1}.get(self, 2)


class RunClock:
    """Seconds in which the child trained; those in which it was parked do not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ran_s = 0.0
        self._since: float | None = None

    @property
    def started(self) -> bool:
        return self._since is not None or self._ran_s > 0

    def go(self) -> None:
        self._since = self._clock() if self._since is None else self._since

    def halt(self) -> None:
        self._ran_s, self._since = self.seconds(), None

    def seconds(self) -> float:
        return self._ran_s + (self._clock() - self._since if self._since is not None else 0.0)


@dataclass(frozen=True)
class Listeners:
    """`end` is told the outcome once the worker's last word is there; `turn` that the child has parked or gone on; `gone` the
    prefix of a checkpoint that is kept no longer."""

    end: Callable[[Outcome], None]
    turn: Callable[[], None]
    gone: Callable[[str], None]


class Conversation:
    """One attempt's."""

    def __init__(self, job: tuple[str, int], store: DriverStore, writer: RecordWriter, listeners: Listeners) -> None:
        self._job = job
        self._store = store
        self._writer = writer
        self._on_end = listeners.end
        self._on_turn = listeners.turn
        self._on_gone = listeners.gone
        self._orders: collections.deque[Order] = collections.deque()
        self._companions: dict[str, collections.deque[Order]] = {}
        self._said_hello: set[str] = set()
        self._companions_end = False
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._at: dict[str, float] = {}
        self.intent: Intent | None = None
        self._leads_to: Outcome | None = None
        self.hello: dict[str, Any] = {}
        self.ready: dict[str, Any] = {}
        self.clock = RunClock()
        self._asked = self._answered = 0
        self._child_parked = False
        self.archiving = False

    @property
    def started(self) -> bool:
        """Whether there is a child that can be asked."""
        return "spawned" in self._at

    @property
    def trains(self) -> bool:
        """Whether the child is between its first step and its last: there is something to park."""
        return "ready" in self._at and not self.archiving

    def stop(self, intent: Intent, outcome: Outcome | None = None) -> None:
        """Asks the child to write a checkpoint and stop at the next step boundary; a cancelled one just ends. `outcome`:
        what this leads to, where the intent alone does not say it."""
        self.intent, self._leads_to = intent, outcome
        if intent is Intent.CANCEL:
            self.kill()
        else:
            self.command("stop")

    @property
    def parked(self) -> bool:
        """Nothing is computed, and no command is on its way that could change it."""
        return self._child_parked and self._answered >= self._asked

    def command(self, command: str) -> None:
        self._asked = next(self._numbers)
        self._orders.append({"order": "command", "id": self._asked, "command": command})

    def stopped(self) -> Outcome:
        """How an attempt ends that was stopped on purpose."""
        if self.intent is None:
            raise RuntimeError("nobody stopped it")
        return self._leads_to or outcome_of(self.intent)

    def kill(self) -> None:
        self._orders.append({"order": "end"})
        self._end_companions()

    def with_companions(self, nodes: Iterable[str]) -> None:
        """The gang's other nodes: those without rank 0."""
        self._companions = {node: collections.deque(maxlen=MAX_WAITING_ORDERS) for node in nodes}

    def _end_companions(self) -> None:
        self._companions_end = True

    def relay(self, records: list[Record]) -> list[Order]:
        """Takes what the worker of rank 0 says, gives what it shall do."""
        with self._lock:
            for kind, group in itertools.groupby(records, key=lambda record: str(record["type"])):
                if kind == "step":
                    self._steps(list(group))
                else:
                    for record in group:
                        self._HANDLERS[kind](self, record)
        return self._take_orders()

    def relay_companion(self, node: str, records: list[Record]) -> list[Order]:
        """Likewise for a gang's other nodes, whose ranks follow the first one: there is something to say only of how they ended
        before their time."""
        with self._lock:
            for record in records:
                self._hear_companion(node, record)
        if self._companions_end:
            return [{"order": "end"}]
        waiting = self._companions[node]
        return [waiting.popleft() for _ in range(len(waiting))]

    def _hear_companion(self, node: str, record: Record) -> None:
        kind = record["type"]
        if kind == "hello":
            self._said_hello.add(node)
        elif kind == "log":
            self._log({**record, "message": f"{node}: {record['message']}"})
        elif kind in ("failed", "lost") and self.intent is None and not self.archiving:
            self._tail(record)
            hello = node in self._said_hello
            self._on_end(_failed_outcome(record) if kind == "failed" else _lost_outcome(record, hello))

    def stage(self, stage: str, seconds: float) -> None:
        """An event that says where the time went."""
        data = {"stage": stage, "seconds": round(seconds, 3)}
        self.event("stage", f"{stage.replace('_', ' ')}: {seconds:.1f} s", data)

    def event(self, type: str, message: str, data: dict[str, Any], level: str = "info") -> None:
        self._writer.submit(lambda: self._store.event(*self._job, type, message, level=level, data=data))

    def _take_orders(self) -> list[Order]:
        taken = []
        while self._orders:
            taken.append(self._orders.popleft())
        return taken

    def _since(self, stage: str, record: Record, mark: str) -> None:
        """The stage that `record` ends began with `mark`; both by the worker's clock."""
        if mark in self._at:
            self.stage(stage, max(0.0, record["at"] - self._at[mark]))

    def _steps(self, records: list[Record]) -> None:
        rows = [StepRow(**{name: record[name] for name in StepRow.__dataclass_fields__}) for record in records]
        self._writer.submit(lambda: self._store.record_steps(*self._job, rows))
        if "step" not in self._at:
            self._at["step"] = records[0]["at"]
            self._since("first_step", records[0], "evaluated" if "evaluated" in self._at else "ready")

    def _spawned(self, record: Record) -> None:
        self._at["spawned"] = record["at"]

    def _hello(self, record: Record) -> None:
        self._at["hello"] = record["at"]
        self.hello = {name: value for name, value in record.items() if name not in ("type", "at", "pid")}
        self._since("imports", record, "spawned")

    def _progress(self, record: Record) -> None:
        """Of a long pass or step, or of files that are stored: now and then, so that it is not taken for one that hangs."""
        now = record["at"]
        if now - self._at.get("progress", 0.0) >= PROGRESS_S:
            self._at["progress"] = now
            what, done, total = record["what"][:200], record["done"], record["total"]
            told = f"{done} of {total}" if total else f"{done}"
            self.event("progress", f"{what}: {told}", {"what": what, "done": done, "total": total})

    def _ready(self, record: Record) -> None:
        self._at["ready"] = record["at"]
        self.ready = {name: value for name, value in record.items() if name not in ("type", "at")}
        self.clock.go()
        self._since("load", record, "hello")
        self._move(JobState.RUNNING, "training")
        planned = f"training {record['steps']} steps" if record["steps"] else "the script runs"
        self.event("ready", f"{planned} from step {record['start_step']}", self.ready)

    def _evaluated(self, record: Record) -> None:
        data = {name: value for name, value in record.items() if name not in ("type", "at")}
        if record["when"] == "before":
            self._at["evaluated"] = record["at"]
            self._since("evaluation_before", record, "ready")
        self.event("evaluated", f"evaluated {record['when']} training, at step {record['step']}", data)

    def _log(self, record: Record) -> None:
        level = record["level"] if record["level"] in LEVELS else "info"
        self.event("log", record["message"][:4000], {}, level)

    def _ack(self, record: Record) -> None:
        """Says where the child stands; what other commands lead to is seen by itself."""
        self._answered = max(self._answered, record["id"])
        was_parked, self._child_parked = self._child_parked, record["state"] == "parked"
        if self._child_parked:
            self.clock.halt()
        elif was_parked:
            self.clock.go()
        self._on_turn()

    def _stored(self, record: Record) -> None:
        """The child may let go of older checkpoints only when the row is there."""

        def commit() -> None:
            gone = self._store.commit_checkpoint(
                *self._job, record["step"], record["prefix"], record["files"], record["metrics"]
            )
            self._orders.append({"order": "saved", "step": record["step"]})
            for prefix in gone:
                self._on_gone(prefix)

        self._writer.submit(commit)

    def _finished(self, record: Record) -> None:
        if self.intent is Intent.CANCEL:
            self.kill()
            return
        self.archiving = True
        self._end_companions()  # what they may lose from now on, their nodes too, is nothing
        self._at["finished"] = record["at"]
        self._move(JobState.ARCHIVING, "storing the model")

    def _artifact(self, record: Record) -> None:
        if self.intent is Intent.CANCEL:  # it finished while it was told to stop: the wish came first
            self._on_end(self.stopped())
            return
        self._since("archiving", record, "finished")
        self._on_end(Outcome(JobState.SUCCEEDED, "the model is stored", artifact=record))

    def _failed(self, record: Record) -> None:
        if self.intent is Intent.CANCEL:
            self._on_end(self.stopped())
            return
        self._tail(record)
        self._on_end(_failed_outcome(record))

    def _stopped(self, record: Record) -> None:
        if self.intent is None:
            self._lost({**record, "exit_code": 0, "signal": None})
        else:
            self._on_end(self.stopped())

    def _lost(self, record: Record) -> None:
        if self.intent is not None:
            self._on_end(self.stopped())
            return
        self._tail(record)
        self._on_end(_lost_outcome(record, hello_heard="hello" in self._at))

    def _release(self, record: Record) -> None:
        """Parked ranks of other nodes wait for a word of the first one. One that says it without end harms its own gang."""
        for waiting in self._companions.values():
            waiting.append({"order": "release", "action": record["action"]})

    def _tail(self, record: Record) -> None:
        self.event("child_output", "the last lines of its output", {"lines": record["log_tail"]}, "warning")

    def _move(self, then: JobState, reason: str) -> None:
        self._writer.submit(lambda: self._store.move(*self._job, then, reason=reason))

    _HANDLERS: dict[str, Callable[[Conversation, Record], None]] = {  # noqa: RUF012
        "spawned": _spawned,
        "hello": _hello,
        "progress": _progress,
        "ready": _ready,
        "evaluated": _evaluated,
        "log": _log,
        "release": _release,
        "ack": _ack,
        "stored": _stored,
        "finished": _finished,
        "artifact": _artifact,
        "failed": _failed,
        "stopped": _stopped,
        "lost": _lost,
    }


def outcome_of(intent: Intent) -> Outcome:
    """Of a child that was stopped on purpose."""
    if intent is Intent.CANCEL:
        return Outcome(JobState.CANCELLED, "cancelled on request")
    if intent is Intent.PAUSE:
        return Outcome(JobState.PAUSED, "paused on request")
    if intent is Intent.SUSPEND:
        return Outcome(JobState.SUSPENDED, "gave way to others")
    return max_runtime_outcome()


def _failed_outcome(record: Record) -> Outcome:
    error = {name: record.get(name) for name in ("code", "message", "param", "hint", "fixable_by")}
    state = JobState.FAILED if error["fixable_by"] in ("user", None) else JobState.RECOVERING
    return Outcome(state, record["message"], error | {"fixable_by": error["fixable_by"] or "user"})


def _lost_outcome(record: Record, hello_heard: bool) -> Outcome:
    """A signal comes from outside (the kernel's memory killer, an operator): it may work again. One that ends by itself
    before it could speak does so each time."""
    if record["signal"] is not None:
        return _killed(f"the training process was ended by {signal_name(record['signal'])}")
    if hello_heard:
        return _killed(f"the training process left with exit code {record['exit_code']}")
    last = record["log_tail"][-1] if record["log_tail"] else "it printed nothing"
    failure = JobFailure(
        f"the training process ended with exit code {record['exit_code']} while it imported its packages: {last}",
        code="child_failed_to_start",
        hint="See the job's log; most often a package of the environment does not fit the others.",
    )
    return Outcome(JobState.FAILED, failure.message, failure.as_dict())


def _killed(how: str) -> Outcome:
    failure = JobFailure(
        how,
        code="child_killed",
        hint="It goes on from its last checkpoint. If it happens again, look at the node's memory: the kernel ends who has most.",
        fixable_by="operator",
    )
    return Outcome(JobState.RECOVERING, how, failure.as_dict())
