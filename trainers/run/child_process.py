"""Starts the child: the tenant's Python on a copy of `trainers` that holds the child's modules only, with an environment
made from nothing. Ends it, too."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trainers
from trainers.protocol import FD_VARIABLE, MARK_VARIABLE, Channel, pair
from trainers.run.parts import WorkerTask

SHIPPED = ("__init__.py", "protocol.py", "config.py", "child")
LAUNCHER = ("-m", "trainers.child.launcher")
WRITABLE = (
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "MPLCONFIGDIR",
    "HF_HOME",
)
"""Libraries write into these; each gets a folder of the attempt's own."""


@dataclass
class Child:
    """`logs`: the reading end of its output."""

    process: subprocess.Popen[bytes]
    channel: Channel
    logs: int

    def end(self, grace_s: float) -> int:
        """Waits for it to leave by itself, then kills what is left of its session; the exit code (negative: the
        signal). Killed before it is reaped: until then its number can mean nobody else."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            select.select([pidfd], [], [], grace_s)
        finally:
            os.close(pidfd)
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


Spawn = Callable[[WorkerTask], Child]


def spawn(task: WorkerTask, command: Sequence[str] = LAUNCHER) -> Child:
    """`command`: the arguments of the tenant's Python. To be called from a thread that lives as long as the job: a
    parent-death signal follows the thread."""
    ours, theirs = pair()
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(  # it outlives this function
            [task.python, *command],
            env=environment(task, theirs.fileno()),
            cwd=_folder(Path(task.scratch) / "work"),
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
    except OSError:
        ours.close()
        os.close(reading)
        raise
    finally:
        theirs.close()
        os.close(writing)
    return Child(process, ours, reading)


def environment(task: WorkerTask, control_fd: int) -> dict[str, str]:
    """Nothing of the worker's own: it holds the cluster's token and the platform's settings."""
    scratch = Path(task.scratch)
    places = {name: str(_folder(scratch / "home" / name.lower())) for name in WRITABLE}
    threads = str(task.threads)
    return {
        **places,
        "PATH": f"{Path(task.python).parent}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(ship_code(scratch / "code")),
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
        "CUDA_VISIBLE_DEVICES": task.visible_devices,
        FD_VARIABLE: str(control_fd),
        MARK_VARIABLE: task.mark,
    }


def ship_code(folder: Path) -> Path:
    """A read-only copy of the child's modules; what is put on the child's PYTHONPATH."""
    source, target = Path(trainers.__file__).parent, folder / "trainers"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SHIPPED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source / name, target / name)
    for file in target.rglob("*.py"):
        file.chmod(0o444)
    return folder


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
