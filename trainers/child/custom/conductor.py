"""The first process of a `custom` run: starts the tenant's script once per slot, and answers for it in the worker's protocol
(`trainers.protocol`), whether or not the script takes part. Standard library only: the environment may have no torch.

`python -m trainers.child.custom.conductor`, with the socket's number in HELIOSTAT_CONTROL_FD."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import select
import selectors
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from trainers.child.custom import processes
from trainers.child.custom.course import Course
from trainers.child.custom.kept import Custody, Nothing, Refused, hashes_of, position_of
from trainers.child.custom.script import Places, Script, free_port, start
from trainers.child.custom.turns import Turns
from trainers.config import TrainConfig
from trainers.protocol import FD_VARIABLE, Channel, Message, signal_name

TICK_S = 1.0
SIGN_OF_LIFE_S = 120.0
"""How often a script that reports nothing but computes is said to be at work, so that it is not taken for one that hangs."""
FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
"""Signals that a script does not bring upon itself: somebody ended it, and it may go better the next time."""
PACKAGES = ("torch", "transformers", "peft")
MAX_LOG_CHARS = 4000
HINTS = {
    "script_failed": "The log has all that it printed. Mend the script, upload it again, and send a new request.",
    "rank_lost": "The log has more. If nobody ended it, look at the machine's memory.",
    "output_empty": "The script must write what it has made into the folder HELIOSTAT_OUTPUT (`job.output`).",
    "output_refused": "Leave regular files without links there, many small ones in one archive.",
}


class Conductor:
    """All in one thread, but for the one that leaves at end of file."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._state = "starting"
        self._step = 0
        self._scripts: list[Script] = []
        self._took_part = False
        self._clean = True
        self._computed_s = 0.0
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Returns at end of file."""
        processes.keep_orphans()
        threading.Thread(target=self._leave_on_hangup, name="hangup", daemon=True).start()
        self._channel.send("hello", pid=os.getpid(), python=platform.python_version(), **_versions())
        self._selector.register(self._channel, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select(TICK_S):
                if key.fileobj is not self._channel:
                    self._hear(key)
                elif (message := self._channel.receive()) is None:
                    return
                else:
                    self._from_worker(message)
            if self._state == "training":
                self._tick()

    def _leave_on_hangup(self) -> None:
        poll = select.poll()
        poll.register(self._channel.fileno(), 0)
        poll.poll()
        processes.end(within_s=1.0)
        os._exit(0)

    def _hear(self, key: selectors.SelectorKey) -> None:
        """Unless what came before, in the same round, has ended it."""
        if key.fd in self._selector.get_map():
            key.data()

    # ── the worker ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_worker(self, message: Message) -> None:
        if message["type"] == "start" and self._state == "starting":
            self._start(message["config"])
        elif message["type"] == "saved" and self._state != "starting":
            self._course.saved(message["step"])
        elif message["type"] == "dropped" and self._state != "starting":
            self._course.dropped(message["step"])
        elif message["type"] == "command":
            self._command(message)

    def _start(self, fields: dict[str, Any]) -> None:
        try:
            config = TrainConfig.from_dict(fields)
            position = position_of(config.resume_from)
        except (TypeError, OSError, ValueError) as error:
            self._state = "failed"
            told = {"code": "config_invalid", "message": f"The run cannot be started: {error}"}
            self._channel.send("failed", step=0, **told, hint=None, fixable_by="operator")
            return
        self._places = Places.make(config)
        self._step = position.step
        self._course = Course(Custody(self._places.custody), position, config.checkpoint_every_s)
        self._turns = Turns(self._channel.send, self._scripts, self._course)
        port = free_port()
        for number in range(config.world_size):
            self._watch(start(config, self._places, number, port))
        self._state = "training"
        steps = config.hyperparams.max_steps or 0
        self._channel.send("ready", steps=steps, start_step=position.step, ranks=config.world_size)

    def _watch(self, script: Script) -> None:
        self._scripts.append(script)
        sources = ((script.channel, self._from_script), (script.printed, self._from_output), (script.ended, self._gone))
        for source, hear in sources:
            self._selector.register(source, selectors.EVENT_READ, partial(hear, script))

    def _command(self, message: Message) -> None:
        if self._state == "training" and message["command"] != "ping":
            self._turns.command(message)
        elif self._state == "training":
            self._turns.answer(message, self._state)
        else:
            if self._state == "starting" and message["command"] == "stop":
                self._state = "finished"
            self._channel.send("ack", id=message["id"], command=message["command"], state=self._state, step=self._step)

    # ── the scripts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _from_output(self, script: Script) -> None:
        if not script.echo():
            self._selector.unregister(script.printed)

    def _from_script(self, script: Script) -> None:
        try:
            message = script.channel.receive()
        except ValueError as error:
            self._fail("script_failed", f"The script sent what is no message of the module `heliostat`: {error}")
            return
        if message is None:
            self._selector.unregister(script.channel)
        elif message["type"] == "here":
            script.is_here = True
        elif message["type"] in ("between", "saved"):
            script.waits, script.yields = message["type"], True
            script.saves = message.get("saves", script.saves)
            self._turns.settle()
        elif message["type"] == "checkpoint":
            self._keep_announced(script, Path(message["folder"]))
        elif message["type"] == "log":
            self._channel.send("log", level="info", message=message["message"][:MAX_LOG_CHARS])
        elif message["type"] == "report" and script.number == 0:
            self._report(message)

    def _report(self, message: Message) -> None:
        try:
            self._channel.send("step", **self._course.report(message))
        except Refused as error:
            self._warn(str(error))
        self._step = self._course.position.step

    def _keep_announced(self, script: Script, folder: Path) -> None:
        """The script calls it complete."""
        try:
            if self._places.checkpoints not in folder.parents or ".." in folder.parts or folder.is_symlink():
                raise Refused(f"{folder} does not lie below {self._places.checkpoints}")
            self._channel.send("checkpoint", **self._course.keep(folder))
        except Refused as error:
            script.tell("refused", message=f"the checkpoint is not kept: {error}")
        else:
            script.tell("taken")

    def _tick(self) -> None:
        self._turns.lose_patience()
        if not self._turns.parked and time.monotonic() - self._course.told_at > SIGN_OF_LIFE_S:
            self._course.told_at = time.monotonic()
            before, self._computed_s = self._computed_s, processes.processor_seconds()
            if self._computed_s - before >= 1:
                self._channel.send("progress", what="processor seconds", done=int(self._computed_s), total=0)

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _gone(self, script: Script) -> None:
        """One has ended: first what it still had to say."""
        while script in self._scripts and script.channel in self._selector.get_map() and readable(script.channel):
            self._from_script(script)
        if script not in self._scripts:  # what it said was the end of all
            return
        script.echo_rest()
        code = script.process.wait()
        self._forget(script)
        self._took_part = self._took_part or script.yields
        self._clean = self._clean and code == 0
        if code != 0 and not self._turns.stopping:
            self._fail(*cause_of(script, code))
        elif self._scripts:
            self._turns.settle()
        elif self._turns.stopping:
            self._stopped()
        else:
            self._finish()

    def _forget(self, script: Script) -> None:
        for source in (script.channel, script.printed, script.ended):
            if source in self._selector.get_map():
                self._selector.unregister(source)
        script.close()
        self._scripts.remove(script)

    def _stopped(self) -> None:
        """A script that takes no part says by its exit code 0 that what lies in its checkpoint folder is whole."""
        processes.end()
        if not self._took_part:
            try:
                if not self._clean:
                    raise Refused("the script did not leave with exit code 0 when it was told to by SIGTERM")
                self._channel.send("checkpoint", **self._course.keep(self._places.checkpoints))
            except Refused as error:
                self._warn(f"no checkpoint is kept: {error}")
        self._close("finished")

    def _finish(self) -> None:
        """Nothing of it is left that could write into its output while that is read."""
        processes.end()
        try:
            hashes = hashes_of(self._places.output)
        except Refused as error:
            told = f"What the script left in HELIOSTAT_OUTPUT is not taken over: {error}."
            self._fail("output_empty" if isinstance(error, Nothing) else "output_refused", told)
            return
        metrics = self._course.position.metrics
        fields = {"artifact": str(self._places.output), "sha256": hashes, "metrics": metrics}
        self._channel.send("finished", step=self._step, **fields)
        self._close("finished")

    def _fail(self, code: str, message: str, fixable_by: str = "user") -> None:
        processes.end()
        fields = {"code": code, "message": message, "hint": HINTS.get(code), "fixable_by": fixable_by}
        self._channel.send("failed", step=self._step, **fields)
        self._close("failed")

    def _close(self, state: str) -> None:
        for script in list(self._scripts):
            script.process.wait()
            self._forget(script)
        self._state = state
        self._turns.answer_all(state)

    def _warn(self, message: str) -> None:
        self._channel.send("log", level="warning", message=message)


def cause_of(script: Script, code: int) -> tuple[str, str, str]:
    """Code, message and whose turn it is, of a script that ended badly."""
    name = f"The script (rank {script.number})" if script.many else "The script"
    if -code in FROM_OUTSIDE:
        return "rank_lost", f"{name} was ended by {signal_name(-code)}.", "operator"
    how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    return "script_failed", f"{name} {how}. The last lines it printed:\n{script.last_lines()}", "user"


def readable(channel: Channel) -> bool:
    return bool(select.select([channel], [], [], 0)[0])


def _versions() -> dict[str, str]:
    """Of what is installed; nothing is imported."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    conductor = Conductor(Channel.from_fd(int(os.environ[FD_VARIABLE])))
    try:
        conductor.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # end of file, met while sending
    finally:
        processes.end(within_s=1.0)
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
