"""Starts the child: the tenant's Python in a sandbox, on a copy of `trainers` that holds the child's modules only, with an
environment made from nothing. Ends it, too."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trainers
from runtime_envs.sandbox.process import Prepared, exit_code, prepared
from trainers.config import launcher_of
from trainers.protocol import FD_VARIABLE, MARK_VARIABLE, Channel, pair
from trainers.run.confinement import WRITABLE, Confinement, confinement, visible
from trainers.run.parts import WorkerTask

SHIPPED = ("__init__.py", "protocol.py", "config.py", "child")


@dataclass
class Child:
    """`logs`: the reading end of its output. `note`: what should be known about its isolation."""

    process: subprocess.Popen[bytes]
    channel: Channel
    logs: int
    sandboxed: bool = False
    note: str = ""

    def end(self, grace_s: float) -> int:
        """Waits for it to leave by itself, then kills what is left of its session; the exit code (negative: the
        signal). Killed before it is reaped: until then its number can mean nobody else. A sandbox dies with the process
        that made it."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            select.select([pidfd], [], [], grace_s)
        finally:
            os.close(pidfd)
        self.kill()
        code = self.process.wait()
        return exit_code(code) if self.sandboxed else code

    def kill(self) -> None:
        """Only before `end` has returned."""
        os.killpg(self.process.pid, signal.SIGKILL)


Spawn = Callable[[WorkerTask], Child]


def spawn(task: WorkerTask, command: Sequence[str] | None = None) -> Child:
    """`command`: the arguments of the tenant's Python; None: the launcher of the task's method. To be called from a thread that
    lives as long as the job: a parent-death signal follows the thread."""
    scratch = Path(task.scratch)
    code = ship_code(scratch / "code")
    command = command or ("-m", launcher_of(task.config.get("method", "")))
    confined = confinement(task)
    ours, theirs = pair()
    reading, writing = os.pipe()
    try:
        with _around(confined) as box:
            process = subprocess.Popen(  # it outlives this function
                [*box.command, task.python, *command],
                env={**environment(task, confined), "PYTHONPATH": str(code), FD_VARIABLE: str(theirs.fileno())},
                cwd=None if confined.sandbox else _folder(scratch / "work"),
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                pass_fds=(theirs.fileno(), *box.fds),
                start_new_session=True,
            )
    except OSError:
        ours.close()
        os.close(reading)
        raise
    finally:
        theirs.close()
        os.close(writing)
    return Child(process, ours, reading, confined.sandbox is not None, confined.note)


@contextmanager
def _around(confined: Confinement) -> Iterator[Prepared]:
    if confined.sandbox is None or confined.mode is None:
        yield Prepared((), ())
        return
    with prepared(confined.sandbox, confined.mode) as box:
        yield box


def environment(task: WorkerTask, confined: Confinement) -> dict[str, str]:
    """Nothing of the worker's own: it holds the cluster's token and the platform's settings."""
    home, threads = confined.home(task), str(task.threads)
    places = {name: home / name.lower() for name in WRITABLE}
    if confined.sandbox is None:
        for place in places.values():
            _folder(place)
    return {
        **{name: str(place) for name, place in places.items()},
        "PATH": f"{Path(task.python).parent}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": visible(task, confined),
        MARK_VARIABLE: task.mark,
    }


def ship_code(folder: Path) -> Path:
    """A copy of the child's modules that other users can read; what is put on the child's PYTHONPATH."""
    source, target = Path(trainers.__file__).parent, folder / "trainers"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SHIPPED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, target / name)
    for path in (folder, target, *target.rglob("*")):  # whatever the umask of the worker
        path.chmod(0o755 if path.is_dir() else 0o444)
    return folder


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
