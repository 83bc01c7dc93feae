"""The processes of training attempts on this machine, found and ended through /proc."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

MARK_VARIABLE = "HELIOSTAT_ATTEMPT"
"""`<job>/<attempt>` in the environment of every process of an attempt. `trainers.protocol` sets it under the same name;
`cluster` may not import that, a test holds the two equal."""

Attempt = tuple[str, int]

_PREFIX = f"{MARK_VARIABLE}=".encode()
_POLL_S = 0.02
_BLANK_S = 0.5
"""For a moment while it starts a program, a process shows no environment; one that shows none for longer has none."""


def running_attempts() -> frozenset[Attempt]:
    """Attempts with a living process that this user may look at."""
    return frozenset(attempt for attempt in map(_attempt_of, _pids()) if attempt is not None)


def end_attempt(job_id: str, attempt: int, timeout_s: float = 5.0) -> bool:
    """SIGKILLs every process of the attempt and waits until none lives; False when some outlive the time.

    Killing and looking alternate, so that what was forked meanwhile is found too."""
    deadline = time.monotonic() + timeout_s
    traces = _Traces((job_id, attempt))
    while (living := traces.living()) or traces.undecided:
        for pid in living:
            traces.kill(pid)
        if time.monotonic() >= deadline:
            return not living
        time.sleep(_POLL_S)
    return True


class _Traces:
    """By what an attempt's processes are known: the mark, and the sessions that marked processes lead. A program may
    rewrite the memory that /proc shows as its environment (setproctitle does); its launcher does not."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._sessions: set[int] = set()  # kept: they outlive their leaders
        self._blank: dict[int, float] = {}

    @property
    def undecided(self) -> bool:
        """Whether one that the last look found just starting a program may be of the attempt."""
        return any(time.monotonic() - since < _BLANK_S for since in self._blank.values())

    def living(self) -> list[int]:
        pids, now = _pids(), time.monotonic()
        shown = {pid: _environment(pid) for pid in pids}
        marked = {pid for pid in pids if _marked_by(shown[pid]) == self._attempt}
        self._blank = {pid: self._blank.get(pid, now) for pid in pids if shown[pid] == b"" and _has_program(pid)}
        self._sessions |= {pid for pid in marked if _session(pid) == pid}
        return [pid for pid in pids if pid in marked or (_session(pid) in self._sessions and _runs(pid))]

    def kill(self, pid: int) -> None:
        """By a pidfd, looked at again: between the look and the signal the number may come to mean another process."""
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if _attempt_of(pid) == self._attempt or _session(pid) in self._sessions:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it ended by itself, which is what was wanted
        finally:
            os.close(fd)


def _pids() -> list[int]:
    return [pid for pid in psutil.pids() if pid != os.getpid()]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _has_program(pid: int) -> bool:
    """Zombies have none, nor what is the kernel's own."""
    try:
        return bool(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return False


def _environment(pid: int) -> bytes | None:
    """Empty of a zombie, which counts as gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _attempt_of(pid: int) -> Attempt | None:
    return _marked_by(_environment(pid))


def _marked_by(environment: bytes | None) -> Attempt | None:
    for variable in (environment or b"").split(b"\0"):
        if variable.startswith(_PREFIX):
            job_id, _, attempt = variable.removeprefix(_PREFIX).decode(errors="replace").rpartition("/")
            return (job_id, int(attempt)) if job_id and attempt.isdecimal() else None
    return None
