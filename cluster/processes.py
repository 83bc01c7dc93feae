"""The processes of training attempts on this machine, found and ended through /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK_VARIABLE = "HELIOSTAT_ATTEMPT"
"""`<job>/<attempt>` in the environment of every process of an attempt. `trainers.protocol` sets it under the same name;
`cluster` may not import that, a test holds the two equal."""

Attempt = tuple[str, int]

_PREFIX = f"{MARK_VARIABLE}=".encode()
_POLL_S = 0.02


def running_attempts() -> frozenset[Attempt]:
    """Attempts with a living process that this user may look at."""
    return frozenset(attempt for attempt in map(_attempt_of, _pids()) if attempt is not None)


def end_attempt(job_id: str, attempt: int, timeout_s: float = 5.0) -> bool:
    """SIGKILLs every process of the attempt and waits until none lives; False when some outlive the time.

    Killing and looking alternate, so that what was forked meanwhile is found too."""
    deadline = time.monotonic() + timeout_s
    while living := list(_living((job_id, attempt))):
        for pid in living:
            _kill(pid, (job_id, attempt))
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _living(attempt: Attempt) -> Iterator[int]:
    """Marked processes, and whatever shares a session that a marked process leads: a program may rewrite the memory
    that /proc shows as its environment (setproctitle does), its launcher does not."""
    for pid in _pids():
        if _attempt_of(pid) == attempt or _attempt_of(_session(pid)) == attempt:
            yield pid


def _kill(pid: int, attempt: Attempt) -> None:
    """By a pidfd, looked at again: between the look and the signal the number may have come to mean another process."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _attempt_of(pid) == attempt or _attempt_of(_session(pid)) == attempt:
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


def _attempt_of(pid: int) -> Attempt | None:
    """A zombie has no environment: it counts as gone."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    for variable in environment.split(b"\0"):
        if variable.startswith(_PREFIX):
            job_id, _, attempt = variable.removeprefix(_PREFIX).decode(errors="replace").rpartition("/")
            return (job_id, int(attempt)) if job_id and attempt.isdecimal() else None
    return None
