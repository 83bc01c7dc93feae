"""The service on this machine, as seen from outside: its state file, its supervisor's process, its data folder.

The supervisor itself (`app.supervisor`) is another process: importing it would load the database's libraries."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from app.cli.errors import HostProblem
from app.processes import end_marked, last_lines, remove_folder

MARKER = "heliostat.data"
"""A file in the data folder that says it is ours; the supervisor writes it."""

READY_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
LOOK_EVERY_S = 0.2
LOG_LINES = 15
CLIENT_VARIABLES = ("HELIOSTAT_URL", "HELIOSTAT_TOKEN", "HELIOSTAT_TOKEN_FILE", "HELIOSTAT_CONTEXT")


@dataclass(frozen=True)
class Launch:
    """How a supervisor is to be started. `port` None: as configured; 0: any free one."""

    data_dir: Path
    config: Path | None = None
    port: int | None = None

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "app.supervisor", "--data-dir", str(self.data_dir)]
        command += ["--config", str(self.config)] if self.config else []
        return command + (["--port", str(self.port)] if self.port is not None else [])


def log_file(data_dir: Path) -> Path:
    return data_dir / "logs" / "supervisor.log"


def read_state(data_dir: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((data_dir / "run" / "supervisor.json").read_text())
    except (OSError, ValueError):
        return None
    return state


def supervisor_of(data_dir: Path, state: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that the state names, if it lives and is this folder's supervisor: numbers are used again."""
    if state is None:
        return None
    try:
        process = psutil.Process(int(state["pid"]))
        ours = "app.supervisor" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
        same = str(data_dir) in process.cmdline() or abs(process.create_time() - float(state["started_at"])) < 30
    except (psutil.Error, KeyError, TypeError, ValueError):
        return None
    return process if ours and same else None


def start(launch: Launch, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, output to its log. It runs in its data folder: a folder named `app` where the user stands
    must not shadow ours. What a client needs is none of its business."""
    log = log_file(launch.data_dir)
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {key: value for key, value in environ.items() if key not in CLIENT_VARIABLES}
    with log.open("ab") as sink:
        return subprocess.Popen(
            launch.command(),
            env=environment,
            cwd=launch.data_dir,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_ready(data_dir: Path, alive: Callable[[], bool], told: Callable[[str], None]) -> dict[str, Any]:
    """The state once it is ready; `told` hears of each phase. Raises `HostProblem`."""
    deadline, phase = time.monotonic() + READY_LIMIT_S, ""
    while time.monotonic() < deadline:
        running = alive()
        state = read_state(data_dir) if running or phase else None
        if state and state.get("phase") not in (None, phase):
            phase = str(state["phase"])
            told(phase)
        if state and running and state.get("ready"):
            return state
        if not running:
            raise _not_started(data_dir, read_state(data_dir))
        time.sleep(LOOK_EVERY_S)
    raise HostProblem(
        f"the service was not ready within {READY_LIMIT_S:.0f} s (phase: {phase})\n{last_lines(log_file(data_dir), LOG_LINES)}",
        code="start_timed_out",
        hint="`heliostat doctor` checks the host",
    )


def _not_started(data_dir: Path, state: Mapping[str, Any] | None) -> HostProblem:
    error = (state or {}).get("error") or {}
    log = last_lines(log_file(data_dir), LOG_LINES)
    if error:
        return HostProblem(str(error.get("message")), code=error.get("code"), hint=error.get("hint"))
    return HostProblem(
        f"the service ended while it started; the last lines of {log_file(data_dir)}:\n{log}",
        code="start_failed",
        hint="`heliostat doctor` checks the host",
    )


def stop(process: psutil.Process, limit_s: float = STOP_LIMIT_S) -> None:
    """Orderly. Raises `HostProblem` when it takes longer than the limit."""
    try:
        process.terminate()
        process.wait(limit_s)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired as error:
        raise HostProblem(
            f"the service (process {process.pid}) did not stop within {limit_s:.0f} s",
            code="stop_timed_out",
            hint="look into logs/supervisor.log in the data folder; try again",
        ) from error


def end_left_behind(data_dir: Path, state: Mapping[str, Any] | None) -> bool:
    """Ends what a supervisor that was killed left running (its port, too, is then free), and removes its state, which says
    `ready`; whether anything ran. The lock tells whether it is dead indeed."""
    if state is None:
        return False
    from app.db.embedded import EmbeddedPostgres  # loads the database's library: only a service that crashed needs it

    instance = state.get("instance")
    try:
        with FileLock(data_dir / "run" / "lock", timeout=0):
            ended = bool(instance) and end_marked(str(instance)) > 0
            ended = EmbeddedPostgres(data_dir / "postgres").end_left_behind() or ended
            if scratch := state.get("scratch"):
                remove_folder(Path(str(scratch)))
            (data_dir / "run" / "supervisor.json").unlink(missing_ok=True)
    except Timeout:
        return False
    return ended


def check_folder(data_dir: Path) -> None:
    """A folder that holds somebody's files does not become a data folder: `down --purge` would remove them."""
    if not data_dir.exists() or (data_dir / MARKER).exists():
        return
    if not data_dir.is_dir() or any(data_dir.iterdir()):
        raise HostProblem(
            f"{data_dir} is not empty and not a data folder of Heliostat",
            code="data_dir_not_ours",
            hint=f"name an empty one with --data-dir, or, if it is one, create the file {MARKER} in it",
        )


def purge(data_dir: Path) -> None:
    """Removes the data folder. Raises `HostProblem` when it is not certainly ours."""
    home = Path.home()
    if not (data_dir / MARKER).is_file() or data_dir == home or data_dir in home.parents or data_dir.is_symlink():
        raise HostProblem(
            f"{data_dir} is not removed: it holds no {MARKER} that says it is Heliostat's own",
            code="data_dir_not_ours",
            hint="look at it and remove it by hand",
        )
    shutil.rmtree(data_dir)


def disk_free_gb(folder: Path) -> float:
    """GiB free where the folder is or would be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free / 2**30


def same_filesystem(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev
