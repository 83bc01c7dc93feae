"""What a job takes of its node, looked at once a second: the memory of its processes, where no cgroup limits it, and the
disk below its folder, where no quota does."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import psutil

LOOK_S = 1.0
FILE_COST_BYTES = 64 * 1024
"""The least that a file counts: millions of empty ones fill a disk, too."""
_KIB = 1024
_RESIDENT = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)
_SHARES = re.compile(rb"^(?:Pss_Anon|Pss_Shmem|SwapPss):\s+(\d+) kB$", re.MULTILINE)

Found = TypeVar("Found")


class Watch(Generic[Found]):
    """Calls `look` in a thread of its own until it finds something, and tells it once."""

    def __init__(self, look: Callable[[], Found | None], tell: Callable[[Found], None]) -> None:
        self._look = look
        self._tell = tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            found = self._look()
            if found is not None:
                self._tell(found)
                return


def memory_over(pid: int, limit_bytes: int) -> int | None:
    """What `pid` and all below it take, when that is more than the limit."""
    # The first sum counts what processes share once for each: cheap, and never too low.
    if tree_bytes(pid, resident_bytes) <= limit_bytes:
        return None
    used = tree_bytes(pid, own_bytes)
    return used if used > limit_bytes else None


def folder_over(folder: Path, limit_bytes: int) -> int | None:
    """What lies below a folder, when that is more than the limit; a folder that cannot be looked into counts as all of it."""
    used, folders = 0, [str(folder)]
    while folders and used <= limit_bytes:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    used += max(FILE_COST_BYTES, 512 * entry.stat(follow_symlinks=False).st_blocks)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue
        except PermissionError:
            used = limit_bytes + 1
    return used if used > limit_bytes else None


def tree_bytes(pid: int, of_one: Callable[[int], int]) -> int:
    """The sum of `of_one` over a process and all below it; 0 when it is gone."""
    try:
        processes = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    return sum(of_one(one) for one in processes)


def resident_bytes(pid: int) -> int:
    """Anonymous and shared memory that is in RAM, files left out."""
    return _sum_of(f"/proc/{pid}/status", _RESIDENT)


def own_bytes(pid: int) -> int:
    """The same with what is shared divided by the number of its users; walks the page tables (milliseconds a GiB)."""
    try:
        return _sum_of(f"/proc/{pid}/smaps_rollup", _SHARES)
    except PermissionError:  # it hides, which a process of our own user can
        return resident_bytes(pid)


def _sum_of(file: str, fields: re.Pattern[bytes]) -> int:
    try:
        text = Path(file).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return _KIB * sum(int(field) for field in fields.findall(text))
