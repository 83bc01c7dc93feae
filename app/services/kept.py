"""A value that costs something to work out: fresh while it is cheap, kept for a while when it is not. For many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
CHEAP_S = 0.1
"""Of processor time: a busy machine makes no value dear."""

KEPT = 10
"""A dear one serves for so many times as long as it took."""


class Kept(Generic[T]):
    """Whoever comes while it is worked out waits, and takes it only if that began after he asked: what a caller has just
    changed shows, as long as working it out is cheap."""

    def __init__(
        self,
        work_out: Callable[[], T],
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._work_out = work_out
        self._clock = clock
        self._spent = spent
        self._lock = threading.Lock()
        self._found: list[T] = []  # one, or none yet
        self._began = 0.0
        self._until = 0.0

    def get(self) -> T:
        asked = self._clock()
        with self._lock:
            if not self._found or (self._began < asked and self._clock() >= self._until):
                began, before = self._clock(), self._spent()
                self._found = [self._work_out()]
                cost = self._spent() - before
                self._began, self._until = began, self._clock() + (KEPT * cost if cost > CHEAP_S else 0.0)
            return self._found[0]
