"""Asks py-rattler, in a process of its own (`engine_process`), and turns its failures into ours."""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime_envs.errors import BUILD_FAILED, CHANNEL_FAILED, INVALID, UNSOLVABLE, EnvironmentProblem
from runtime_envs.materialize import NO_SPACE, build_failed
from runtime_envs.uv import INHERITED, READABLE_UMASK

PROCESS = Path(__file__).with_name("engine_process.py")
FETCH = Path(__file__).with_name("fetch_process.py")
TIMEOUT_S = 1800.0
MAX_REASON_CHARS = 3000
IDLE_PROCESSES = 2
CODES = {"unsolvable": UNSOLVABLE, "invalid": INVALID}

Progress = Callable[[dict[str, Any]], None]


def index_channel(folder: Path) -> None:
    """Writes the repodata of a channel on this disk."""
    ask({"task": "index", "channel": str(folder)})


def ask(
    question: dict[str, Any],
    *,
    script: Path = PROCESS,
    progress: Progress = lambda _: None,
    keep_fd: int | None = None,
) -> dict[str, Any]:
    """Blocks for seconds to minutes. `keep_fd` is handed down, so that a lock on it lives as long as the process. Raises
    EnvironmentProblem with one of `CODES`, or `environment_channel_failed`, `environment_build_failed`, `environment_disk_full`."""
    with Engine(script, keep_fd) as engine:
        return engine.ask(question, progress)


def ask_again(question: dict[str, Any]) -> dict[str, Any]:
    """As `ask`, of a process that stays for the next question: it knows the channels by then. For what holds no lock."""
    try:
        engine = _idle.pop()
    except IndexError:  # no question whether there is one: threads ask at the same time
        engine = Engine()
    answer = engine.answer(question)
    if answer is None:  # it has ended meanwhile
        engine.close()
        engine = Engine()
        answer = engine.answer(question)
    if answer is None or len(_idle) >= IDLE_PROCESSES:
        with engine:
            return engine.result(answer)
    _idle.append(engine)
    return engine.result(answer)


class Engine:
    """The process: it starts while we go on. Ends with its stdin, so with us too; and by itself when it is not asked for long."""

    def __init__(self, script: Path = PROCESS, keep_fd: int | None = None) -> None:
        self._stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={name: value for name, value in os.environ.items() if name in INHERITED},
            pass_fds=() if keep_fd is None else (keep_fd,),
            umask=READABLE_UMASK,
        )

    def ask(self, question: dict[str, Any], progress: Progress = lambda _: None) -> dict[str, Any]:
        """Raises as the function `ask`."""
        return self.result(self.answer(question, progress))

    def answer(self, question: dict[str, Any], progress: Progress = lambda _: None) -> dict[str, Any] | None:
        """Its last line; None when it ended without one, or had to be ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        killer = threading.Timer(TIMEOUT_S, self._process.kill)
        killer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                said: dict[str, Any] = json.loads(line)
                if "result" in said or "error" in said:
                    return said
                progress(said)
        except BrokenPipeError:
            return None
        finally:
            killer.cancel()
        return None

    def result(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        """Of an answer. Raises EnvironmentProblem where there is none, or it is an error."""
        if answer is None:
            raise _problem("install", self._complaint() or "its process ended without an answer")
        if "error" in answer:
            raise _problem(answer["error"]["kind"], answer["error"]["message"])
        result: dict[str, Any] = answer["result"]
        return result

    def _complaint(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read()[-MAX_REASON_CHARS:]

    def close(self) -> None:
        self._process.kill()  # after its answer there is nothing left to do
        with suppress(BrokenPipeError):
            self._process.__exit__(None, None, None)
        self._stderr.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_idle: list[Engine] = []


@atexit.register
def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


def _problem(kind: str, message: str) -> EnvironmentProblem:
    reason = re.sub(r"://[^/@\s]+@", "://***@", message.strip())[:MAX_REASON_CHARS]
    if kind == "install" and re.search(r"error sending request|error decoding response|HTTP status|connect", reason):
        kind = "channel"
    if kind == "channel" and NO_SPACE not in reason:
        return EnvironmentProblem(
            CHANNEL_FAILED, f"The conda channel did not deliver: {reason}",
            hint="Try again; what was downloaded is kept. If it stays, the operator should check the channel.",
            fixable_by="operator",
        )  # fmt: skip
    if kind == "refused":
        return EnvironmentProblem(
            BUILD_FAILED, f"The environment cannot be made: {reason}.",
            hint="Leave out this package or what needs it, or choose another version.",
        )  # fmt: skip
    if kind in ("install", "channel"):
        return build_failed(reason)
    return EnvironmentProblem(CODES[kind], reason, hint="Loosen or change the named version, or check the spelling.")
