"""Between steps the loop asks one object: go on, write a checkpoint, wait, or stop. Rank 0 decides, all ranks do the same at
the same step, and every command is answered in every state."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from trainers.child.failure import Stopped
from trainers.child.world import World
from trainers.protocol import Message

GO_ON, CHECKPOINT, PARK, STOP = range(4)
PROGRESS_S = 60.0
"""Without a word, and a pass is one that takes long."""
MAX_UNSAVED = 2
"""So many checkpoints lie here, and nobody knows whether they are stored, before no further one is due."""
MOST_OF_TIME = 0.1
"""That checkpoints may hold the training up: where one takes long, they become rarer."""
ACTIONS = {"checkpoint": CHECKPOINT, "park": PARK, "resume": GO_ON, "stop": STOP}


class Wire(Protocol):
    """What a rank talks over: a `Channel` to the launcher, or `Printer` where there is none."""

    def send(self, type: str, **fields: Any) -> None: ...

    def receive(self) -> Message | None: ...


@dataclass(frozen=True)
class Actions:
    """What only the recipe can do. `save` runs on all ranks together, and may leave the slow part to a thread; `settle` waits
    for that; `prune` frees what an older step left, `drop` what that step did; `leave` gives the accelerator's memory
    back, `come_back` takes it again."""

    save: Callable[[], None]
    prune: Callable[[int], None]
    drop: Callable[[int], None] = lambda step: None
    settle: Callable[[], None] = lambda: None
    leave: Callable[[], None] = lambda: None
    come_back: Callable[[], None] = lambda: None


class Control:
    """`checkpoint_every_s`: 0: after each step, whatever that costs and however many are not stored yet."""

    def __init__(
        self, wire: Wire, world: World, checkpoint_every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.state = "loading"
        self.step = 0
        self._wire = wire
        self._world = world
        self._every_s = checkpoint_every_s
        self._clock = clock
        self._actions: Actions | None = None
        self._saved_step = 0
        self._saved_at = self._told_at = clock()
        self._cost_s = 0.0
        self._unsaved: set[int] = set()
        self._commands: queue.Queue[Message] = queue.Queue()
        self._released: queue.Queue[int] = queue.Queue()
        self._lock = threading.Lock()
        self._closed = False
        self._parked = False

    def listen(self) -> None:
        """Answers from now on. The thread also ends this process when the launcher is gone, whatever it computes."""
        threading.Thread(target=self._listen, name="control", daemon=True).start()

    def join(self, world: World) -> None:
        """The other ranks are there; from now on `between` may be called."""
        self._world = world

    def attach(self, actions: Actions, step: int) -> None:
        """The run is loaded and stands at `step`, which needs no checkpoint."""
        self._actions = actions
        self.step = self._saved_step = step
        self._saved_at = self._clock()

    def emit(self, type: str, **fields: Any) -> None:
        """A message to the worker, from rank 0 only."""
        self._told_at = self._clock()
        if self._world.rank == 0:
            self._wire.send(type, **fields)

    def progress(self, what: str, done: int, total: int) -> None:
        """Of a pass that may take long, from within it, as often as one likes: so that it is not taken for one that hangs."""
        if self._clock() - self._told_at >= PROGRESS_S:
            self.emit("progress", what=what, done=done, total=total)

    @contextlib.contextmanager
    def during(self, state: str) -> Iterator[None]:
        before, self.state = self.state, state
        yield
        self.state = before

    def between(self) -> None:
        """Called by all ranks at the same places, where the run could be cut. Raises Stopped."""
        while True:
            action, command = self._agree()
            if action in (GO_ON, STOP):
                self._unpark()
            if action == PARK:
                self._park()
            elif action != GO_ON:
                self.save(wait=command is not None or action == STOP)
            if action == STOP:
                self.state = "finished"
            self._answer(command)
            if action == STOP:
                self.close()
                raise Stopped
            if action == GO_ON:
                return

    def _park(self) -> None:
        """Whoever hears that this run is parked may use what it held."""
        if self._actions is not None and not self._parked:
            self._actions.settle()
            self._actions.leave()
        if not self._parked:
            self._world.barrier()
        self._parked = True

    def _unpark(self) -> None:
        if self._actions is not None and self._parked:
            self._actions.come_back()
        self._parked = False

    def save(self, *, wait: bool = True) -> None:
        """A checkpoint of the step that is done, if it has none yet; `wait`: until it is on the disk."""
        if self._actions is None:
            return
        if self.step > self._saved_step:
            if self._parked:
                self._actions.come_back()
            with self._lock:
                self._unsaved.add(self.step)
            began = self._clock()
            with self.during("checkpointing"):
                self._actions.save()
            if self._parked:
                self._actions.leave()
            self._saved_step, self._saved_at = self.step, self._clock()
            self._note_cost(self._saved_at - began)
        if wait:
            self._actions.settle()

    def _note_cost(self, seconds: float) -> None:
        """What the training waited for; the disk's part has a thread of its own."""
        before, self._cost_s = self._period_s, seconds
        if before == self._every_s < self._period_s:
            message = (
                f"A checkpoint holds the training up for {seconds:.1f} s: from now on one about every {self._period_s:.0f} s, "
                f"so that they take at most {MOST_OF_TIME:.0%} of its time."
            )
            self.emit("log", level="info", message=message)

    @property
    def _period_s(self) -> float:
        return max(self._every_s, self._cost_s / MOST_OF_TIME) if self._every_s else 0.0

    def close(self) -> None:
        """The loop asks no more: from now on commands are answered as they come."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._answer(self._commands.get_nowait())

    def _agree(self) -> tuple[int, Message | None]:
        if self._world.rank == 0:
            action, command = self._decide()
            if not self._parked:
                self._world.from_first(action)
            elif self._world.size > 1:
                self._wire.send("release", action=action)
            return action, command
        # who is parked waits on its pipe: a collective would run into its time limit
        return (self._released.get() if self._parked else self._world.from_first(0)), None

    def _decide(self) -> tuple[int, Message | None]:
        try:
            command = self._commands.get(block=self._parked)
        except queue.Empty:
            return (CHECKPOINT if self._due() else GO_ON), None
        return ACTIONS[command["command"]], command

    def _due(self) -> bool:
        if self.step <= self._saved_step or self._clock() - self._saved_at < self._period_s:
            return False
        return not self._every_s or len(self._unsaved) < MAX_UNSAVED

    def _answer(self, command: Message | None) -> None:
        if command is not None:
            state = "parked" if self._parked else self.state
            self._wire.send("ack", id=command["id"], command=command["command"], state=state, step=self.step)

    def _listen(self) -> None:
        while (message := self._wire.receive()) is not None:
            self._take(message)
        os._exit(1)

    def _take(self, message: Message) -> None:
        if message["type"] == "release":
            self._released.put(message["action"])
        elif message["type"] in ("saved", "dropped"):
            self._let_go(message["step"], saved=message["type"] == "saved")
        elif message["type"] == "command":
            with self._lock:
                waits = message["command"] in ACTIONS and not self._closed
                if waits:
                    self._commands.put(message)
            if not waits:
                self._answer(message)

    def _let_go(self, step: int, *, saved: bool) -> None:
        """Uploads go in order: what is older than a stored one is stored, too, or dropped."""
        with self._lock:
            self._unsaved -= {one for one in self._unsaved if one == step or (saved and one < step)}
        if self._actions is not None:
            (self._actions.prune if saved else self._actions.drop)(step)
