"""The memory limit on a CPU: of a process of its own, since what it sets holds for all of a process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainers.child.failure import TrainFailure
from trainers.child.memory import GIB, MemoryLimit, peak_resident_bytes, resident_bytes

MB = 1_000_000


def in_a_child(work: Callable[[], Any]) -> Any:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: theirs.send(work()))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def test_what_was_given_back_within_a_step_counts() -> None:
    def work() -> tuple[float, str | None]:
        limit = MemoryLimit(0.1, "cpu")
        limit.check()
        kept = torch.ones(20 * MB // 4)
        limit.check()
        torch.ones(200 * MB // 4).sum()
        try:
            limit.check()
        except TrainFailure as failure:
            return limit.peak_gb(), failure.code + str(kept.shape)[:0]
        return limit.peak_gb(), None

    peak_gb, code = in_a_child(work)
    assert code == "memory_limit_exceeded"
    assert peak_gb * GIB == pytest.approx(220 * MB, rel=0.15)


def test_with_a_limit_freed_tensors_go_back_to_the_kernel() -> None:
    def work(limit_gb: float | None) -> int:
        MemoryLimit(limit_gb, "cpu")
        before = resident_bytes()
        # each is larger than those before, so that none finds room where another was
        tensors = [torch.ones(2 * MB // 4 + 10_000 * i) for i in range(40)]
        last = torch.ones(MB // 4)
        del tensors
        return resident_bytes() - before - last.nbytes

    assert in_a_child(lambda: work(10.0)) < 8 * MB


def test_the_peak_begins_with_the_run() -> None:
    def work() -> tuple[int, float]:
        torch.ones(150 * MB // 4).sum()
        limit = MemoryLimit(None, "cpu")
        return peak_resident_bytes() - resident_bytes(), limit.peak_gb()

    above, peak_gb = in_a_child(work)
    assert above < 20 * MB and peak_gb * GIB < 20 * MB
