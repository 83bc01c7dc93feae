"""The memory that a job was promised not to exceed, held against what this process has."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from trainers.child.failure import TrainFailure

GIB = 1 << 30


class MemoryLimit:
    """`limit_gb`: GiB above what the process has now, after its imports; on a GPU, of the GPU's memory."""

    def __init__(self, limit_gb: float | None, device: str) -> None:
        self._limit_gb = limit_gb
        self._baseline = resident_bytes()
        if limit_gb is not None and device != "cpu":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gb * GIB / total), device)
            self._limit_gb = None  # the allocator refuses by itself

    def check(self) -> None:
        """Raises TrainFailure."""
        if self._limit_gb is None:
            return
        used_gb = (resident_bytes() - self._baseline) / GIB
        if used_gb > self._limit_gb:
            raise TrainFailure(
                "memory_limit_exceeded",
                f"The training uses {used_gb:.2f} GiB, its limit is {self._limit_gb:g} GiB.",
                hint="Raise mem_limit_gb, or lower batch_size or max_seq_len.",
            )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
