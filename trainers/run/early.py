"""One training child that is started before its worker, and the agent's side of its keeper."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

import trainers
from cluster.errors import HeliostatError, JobFailure
from runtime_envs.sandbox.cgroup import Group, sweep
from runtime_envs.sandbox.spec import GIB
from runtime_envs.sandbox.watch import Watch, tree_bytes
from trainers.protocol import MARK_VARIABLE, Channel, pair
from trainers.run.child_process import Start, starting
from trainers.run.confinement import KEEPER, given, node_share
from trainers.run.keeper import Kept
from trainers.run.parts import WorkerTask

CHILD_GB = 1.0
"""GiB that a child may take while it waits; torch, transformers and peft take 0.3."""
WAITING_S = 120
"""Of the processor, likewise: imports take a few."""
KEPT_S = 30.0
"""For a keeper to say that it has started its child."""
_SYS_NICE = 1 << 23
"""Of the capabilities, as Linux numbers them."""


class Early:
    """The keeper goes, and the child with it, when the process that made this ends before the worker has come. `usual`: the
    child's priority; a low one while it `waits`. Raises OSError, and what `starting` raises."""

    def __init__(self, task: WorkerTask, command: Sequence[str] | None, usual: int, *, waits: bool) -> None:
        self.folder = _folder(Path(task.scratch) / KEEPER)
        self._waits = waits
        self._channel, theirs = pair()
        try:
            with starting(task, command) as start:
                self._process = _start_keeper(task.mark, theirs, start.fds)
                self._channel.send("keep", **_kept(start, self.folder, usual, waits=waits))
            self._made_of = _made_of(task)
            self._child, self._group = self._first_word()
            self._watch = self._watching(task)
        except (HeliostatError, OSError):
            self._channel.close()
            raise
        finally:
            theirs.close()
        threading.Thread(target=self._mind, name=f"early {task.mark}", daemon=True).start()

    def suits(self, task: WorkerTask) -> bool:
        """Whether it would not be another one if it were started now."""
        return self._made_of == _made_of(task)

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def start(self, config: dict[str, Any]) -> None:
        """Raises OSError when it is gone."""
        self._waits = False
        self._channel.send("start", config=config)

    def keep_waiting(self) -> None:
        """Who takes more of the processor than imports do has something else in mind."""
        if tree_bytes(self._child, _processor_s) > WAITING_S:
            self.end()
        else:
            self._tell("wait")

    def end(self) -> None:
        """Before it was told to start."""
        self._tell("end")

    def _tell(self, type: str, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # its worker has it by now, or it is dead
            self._channel.send(type, **fields)

    def _first_word(self) -> tuple[int, Group]:
        try:
            message = self._channel.receive(KEPT_S)
        except TimeoutError:
            message = None
        if message is None:
            self._process.kill()
            self._process.wait()
            raise OSError("its keeper did not start it")
        return int(message["pid"]), Group(**message["group"])

    def _watching(self, task: WorkerTask) -> Watch[tuple[bool, JobFailure]]:
        """As its worker will: what it takes is taken from others. While it waits it has less, and going over that is no
        failure of its job."""
        share, output = node_share(task), Path(task.config["output_dir"])
        waiting = replace(share, memory_bytes=min(share.memory_bytes, int(CHILD_GB * GIB)))

        def look() -> tuple[bool, JobFailure] | None:
            waits = self._waits  # it may be granted during the look
            failure = (waiting if waits else share).exceeded(self._child, output, self._group)
            return None if failure is None else (waits, failure)

        def tell(found: tuple[bool, JobFailure]) -> None:
            waited, failure = found
            if waited:
                self.end()
            else:
                self._tell("failed", **failure.as_dict())

        return Watch(look, tell)

    def _mind(self) -> None:
        """What it takes is watched until its worker does that; a keeper that has ended is reaped."""
        self._watch.start()
        self._channel.receive()  # its end of file: handed over, or dead
        self._watch.close()
        self._process.wait()
        sweep()  # a keeper that was killed leaves its group
        self._channel.close()


def _folder(parent: Path) -> Path:
    """A new one, for the platform's user alone: what was there before may still be on its way out."""
    parent.mkdir(mode=0o700, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=parent))


def _processor_s(pid: int) -> int:
    try:
        spent = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0
    return int(spent.user + spent.system + spent.children_user + spent.children_system)


def _start_keeper(mark: str, agent: Channel, fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """With nothing of the agent's own environment: the child's mark, by which it is found and ended."""
    return subprocess.Popen(  # it outlives this function
        [sys.executable, "-S", "-m", Kept.__module__],
        env={"PYTHONPATH": str(Path(trainers.__file__).parents[1]), MARK_VARIABLE: mark},
        stdin=agent.fileno(),
        stdout=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,
    )


def _kept(start: Start, folder: Path, usual: int, *, waits: bool) -> dict[str, Any]:
    return asdict(
        Kept(
            command=start.command,
            environment=start.environment,
            cwd=None if start.cwd is None else str(start.cwd),
            fds=list(start.fds),
            folder=str(folder),
            sandboxed=start.sandboxed,
            note=start.note,
            usual=usual,
            waits=waits and may_change_priority(),
            group=asdict(start.group),
        )
    )


def _made_of(task: WorkerTask) -> tuple[object, ...]:
    """All that is fixed when a child starts."""
    places = tuple(given(Path(task.scratch)))
    fixed = (task.python, task.scratch, task.uid, task.threads, task.visible_devices, task.settings, task.address)
    return (*fixed, task.config["base_model"], places)


def may_change_priority() -> bool:
    """Whether what is put back can be put forward again."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) & _SYS_NICE)
