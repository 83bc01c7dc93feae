"""The memory that a job was promised not to exceed, held against what this process has; and the most that it had."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import torch

from trainers.child.failure import TrainFailure

GIB = 1 << 30
M_MMAP_THRESHOLD = -3
MAPPED_BYTES = 512 << 10
"""Of an allocation that gets pages of its own in a process with a limit, and gives them back when it is freed."""


class MemoryLimit:
    """`limit_gb`: GiB above what the process has now, after its imports; on a GPU, of the GPU's memory."""

    def __init__(self, limit_gb: float | None, device: str) -> None:
        self._limit_gb = limit_gb
        self._device = device
        if device == "cpu":
            _forget_peak()
        self._baseline = resident_bytes()
        if limit_gb is None:
            return
        if device == "cpu":
            return_freed_memory()
        else:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GIB / total), device)
            self._limit_gb = None  # the allocator refuses by itself

    def check(self) -> None:
        """Whether it was ever exceeded, also within a step. Raises TrainFailure."""
        if self._limit_gb is None:
            return
        used_gb = self.peak_gb()
        if used_gb > self._limit_gb:
            raise TrainFailure(
                "memory_limit_exceeded",
                f"The training took {used_gb:.2f} GiB, its limit is {self._limit_gb:g} GiB.",
                hint="Raise mem_limit_gb, or lower batch_size or max_seq_len.",
            )

    def peak_gb(self) -> float:
        """The most so far in GiB, as the limit counts it; on a GPU, what torch's allocator handed out."""
        if self._device != "cpu":
            return float(torch.cuda.max_memory_allocated(self._device)) / GIB
        return max(0, peak_resident_bytes() - self._baseline) / GIB


def return_freed_memory() -> None:
    """Large tensors go back to the kernel when they are freed. As glibc does it by itself (up to 2.37), freed blocks pile up to
    as much again as a step needs, since it finds no aligned room among them; giving back costs CPU time for new pages, so that
    only a process with a limit does it. Elsewhere than on glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """Since the process began, or since `_forget_peak` where the kernel allows it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # a /proc that is read-only; the peak then includes the imports'
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
