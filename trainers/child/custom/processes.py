"""The processes below this one: found, whatever they did to leave; held, continued, ended; and what they have computed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Seen:
    parent: int
    ticks: int
    """Of processor time."""


def keep_orphans() -> None:
    """From now on those whose parent ends are children of this process, not lost."""
    _LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """In a forked process: it ends when `parent` does, however that happens."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def below() -> dict[int, Seen]:
    """By number; zombies are left out."""
    everyone = _everyone()
    found: dict[int, Seen] = {}
    parents = {os.getpid()}
    while parents:
        children = {pid: one for pid, one in everyone.items() if one.parent in parents and pid not in found}
        found |= children
        parents = set(children)
    return found


def hold() -> None:
    """None of them computes from now on. Again until no new one turns up: one may have been forking."""
    held: set[int] = set()
    while new := below().keys() - held:
        _signal(new, signal.SIGSTOP)
        held |= new


def go_on() -> None:
    _signal(below(), signal.SIGCONT)


def end(within_s: float = 5.0) -> None:
    """Of a process that is killed, what it leaves behind comes into sight the next time round."""
    deadline = time.monotonic() + within_s
    while (found := below()) and time.monotonic() < deadline:
        _signal(found, signal.SIGKILL)
        time.sleep(0.005)


def processor_seconds() -> float:
    """Of those that are there."""
    return sum(one.ticks for one in below().values()) / os.sysconf("SC_CLK_TCK")


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _everyone() -> dict[int, Seen]:
    seen: dict[int, Seen] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    seen[int(entry.name)] = Seen(int(fields[1]), int(fields[11]) + int(fields[12]))
    return seen
