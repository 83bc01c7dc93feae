"""What the worker commands against where the scripts stand: those that call `between` are cut there, all ranks at the same
step, and held there by signals, threads and other processes of theirs too; those that do not are held wherever they are, and told
to leave by SIGTERM."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from trainers.child.custom import processes
from trainers.child.custom.course import Course
from trainers.child.custom.kept import Refused
from trainers.child.custom.script import Script
from trainers.protocol import Message

PATIENCE_S = 15.0
"""For a script that has the control object to come to `between`. Then a park holds it where it is, and one that has never
come there is taken for one that takes no part."""

Send = Callable[..., None]


class Turns:
    """`send`: a message to the worker. `scripts`: those that live, as others add and remove them. `state`: of the run."""

    def __init__(
        self, send: Send, scripts: list[Script], course: Course, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stopping = False
        """They were told to leave; the command is answered when they have."""
        self._send = send
        self._scripts = scripts
        self._course = course
        self._clock = clock
        self._commands: deque[tuple[Message, float]] = deque()
        self._parked = False
        """They wait in `between`."""
        self._held = False
        """They were stopped wherever they were."""
        self._still = False
        """They are stopped by a signal, here or there."""

    @property
    def parked(self) -> bool:
        return self._parked or self._held

    @property
    def yields(self) -> bool:
        return any(script.yields for script in self._scripts)

    @property
    def _takes_part(self) -> bool:
        """Or may do so soon."""
        return any(script.yields or script.is_here for script in self._scripts)

    def command(self, message: Message) -> None:
        self._commands.append((message, self._clock()))
        self.settle()

    def settle(self) -> None:
        """To be called when anything has changed."""
        if self._held or not self._takes_part:
            self._from_outside()
        waits = {script.waits for script in self._scripts}
        if self._held or self.stopping or not self.yields or len(waits) != 1:
            return
        if waits == {"saved"}:
            self._keep()
        if waits != {None}:
            self._decide()

    def lose_patience(self) -> None:
        """To be called now and then."""
        if self._commands and not self.parked and not self.stopping:
            message, since = self._commands[0]
            by_force = message["command"] == "park" or not self.yields
            if by_force and self._clock() - since > PATIENCE_S:
                self._from_outside()

    def answer(self, message: Message, state: str) -> None:
        fields = {"id": message["id"], "command": message["command"], "step": self._course.position.step}
        self._send("ack", **fields, state="parked" if self.parked else state)

    def answer_all(self, state: str) -> None:
        """The scripts have ended: whatever was asked for, this is how it stands."""
        self._parked = self._held = self._still = False
        while self._commands:
            self.answer(self._commands.popleft()[0], state)

    # ── between two steps ───────────────────────────────────────────────────────────────────────────────────────────

    def _decide(self) -> None:
        """All wait at the same place."""
        can_save = self._course.fresh and all(script.saves for script in self._scripts)
        while self._commands:
            command = self._commands[0][0]["command"]
            if can_save and command in ("checkpoint", "stop"):
                return self._save()
            if command == "stop":
                self.stopping, self._parked = True, False
                return self._tell_all("stop")
            self._parked = command == "park" or (self._parked and command != "resume")
            if self._parked:
                self._hold()
            self.answer(self._commands.popleft()[0], "training")
        if not self._parked:
            self._go_on(can_save)
        return None

    def _go_on(self, can_save: bool) -> None:
        if can_save and self._course.due:
            self._save()
        else:
            self._course.fresh = True
            self._tell_all("go")

    def _save(self) -> None:
        self._tell_all("save", folder=str(self._course.open()))

    def _keep(self) -> None:
        for script in self._scripts:
            script.waits = "between"
        try:
            self._send("checkpoint", **self._course.keep())
        except Refused as error:
            self._send("log", level="warning", message=f"the checkpoint is not kept: {error}")

    def _tell_all(self, type: str, **fields: Any) -> None:
        self._let_go()
        for script in self._scripts:
            script.waits = None
            script.tell(type, **fields)

    # ── wherever they are ───────────────────────────────────────────────────────────────────────────────────────────

    def _from_outside(self) -> None:
        while self._commands and not self.stopping:
            command = self._commands[0][0]["command"]
            if command == "park" and not self._held:
                self._hold()
                self._held = True
            elif command in ("resume", "stop") and self._held:
                self._let_go()
                self._held = False
            if command == "stop":
                return self._terminate()
            self.answer(self._commands.popleft()[0], "training")
        return None

    def _terminate(self) -> None:
        """One that calls `between` is told there."""
        if not self.yields:
            self.stopping = True
            for script in self._scripts:
                script.process.terminate()

    def _hold(self) -> None:
        if not self._still:
            processes.hold()
        self._still = True

    def _let_go(self) -> None:
        if self._still:
            processes.go_on()
        self._still = False
