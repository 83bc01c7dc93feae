"""Asks py-rattler, in a process of its own (`engine_process`), and turns its failures into ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime_envs.errors import CHANNEL_FAILED, INVALID, UNSOLVABLE, EnvironmentProblem
from runtime_envs.materialize import NO_SPACE, build_failed
from runtime_envs.uv import INHERITED, READABLE_UMASK

PROCESS = Path(__file__).with_name("engine_process.py")
TIMEOUT_S = 1800.0
MAX_REASON_CHARS = 3000
CODES = {"unsolvable": UNSOLVABLE, "invalid": INVALID}

Progress = Callable[[dict[str, Any]], None]


def index_channel(folder: Path) -> None:
    """Writes the repodata of a channel on this disk."""
    ask({"task": "index", "channel": str(folder)})


def ask(question: dict[str, Any], *, progress: Progress = lambda _: None, keep_fd: int | None = None) -> dict[str, Any]:
    """Blocks for seconds to minutes. `keep_fd` is handed down, so that a lock on it lives as long as the process. Raises
    EnvironmentProblem with one of `CODES`, or `environment_channel_failed`, `environment_build_failed`, `environment_disk_full`."""
    with tempfile.TemporaryFile("w+") as asked, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        json.dump(question, asked)
        asked.seek(0)
        with subprocess.Popen(
            [sys.executable, "-I", str(PROCESS)],
            stdin=asked,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={name: value for name, value in os.environ.items() if name in INHERITED},
            pass_fds=() if keep_fd is None else (keep_fd,),
            umask=READABLE_UMASK,
        ) as process:
            answer = _answer(process, progress)
        if answer is None:
            stderr.seek(0)
            raise _problem("install", stderr.read()[-MAX_REASON_CHARS:] or "its process ended without an answer")
    if "error" in answer:
        raise _problem(answer["error"]["kind"], answer["error"]["message"])
    result: dict[str, Any] = answer["result"]
    return result


def _answer(process: subprocess.Popen[str], progress: Progress) -> dict[str, Any] | None:
    """Its last line; None when it ended without one, or had to be ended."""
    assert process.stdout is not None
    killer = threading.Timer(TIMEOUT_S, process.kill)
    killer.start()
    try:
        for line in process.stdout:
            said: dict[str, Any] = json.loads(line)
            if "result" in said or "error" in said:
                return said
            progress(said)
    finally:
        killer.cancel()
        process.kill()  # after its answer there is nothing left to do
    return None


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
    if kind in ("install", "channel"):
        return build_failed(reason)
    return EnvironmentProblem(CODES[kind], reason, hint="Loosen or change the named version, or check the spelling.")
