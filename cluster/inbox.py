"""What has changed since the scheduler last looked; whoever knows of a change puts it in and wakes the loop."""

from __future__ import annotations

import threading
from collections.abc import Collection


class Inbox:
    """Begins with everything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._ids: set[str] | None = None

    def put(self, ids: frozenset[str] | None) -> None:
        """Jobs whose rows changed; None: anything may have."""
        self.remember(ids)
        if ids is None or ids:
            self.wake()

    def remember(self, ids: Collection[str] | None) -> None:
        """As `put`, for when the loop comes round by itself."""
        with self._lock:
            if ids is None or self._ids is None:
                self._ids = None
            else:
                self._ids |= set(ids)

    def wake(self) -> None:
        self._woken.set()

    def take(self) -> frozenset[str] | None:
        """None: everything. What comes from now on is for the next time."""
        self._woken.clear()
        with self._lock:
            taken = None if self._ids is None else frozenset(self._ids)
            self._ids = set()
        return taken

    def wait(self, timeout_s: float) -> None:
        self._woken.wait(max(0.0, timeout_s))
