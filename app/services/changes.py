"""One thread a process that hears PostgreSQL's notifications and wakes whoever follows events.

A notification is a hint only: followers read the rows, and look by themselves now and then."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app.db.listen import EVENTS, Listener
from cluster.errors import Unavailable

HEAR_S = 0.5
RETRY_S = 1.0


class Follower:
    """Wakes in its own event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def wake(self) -> None:
        """From any thread. A loop that has closed meanwhile follows nothing any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next change, also one since the last `wait`, or after the timeout."""
        try:
            await asyncio.wait_for(self._event.wait(), timeout_s)
        except TimeoutError:
            return
        self._event.clear()


class Changes:
    """Starts listening with the first follower."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._followers: set[Follower] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def follow(self) -> Iterator[Follower]:
        follower = Follower()
        with self._lock:
            self._followers.add(follower)
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="changes", daemon=True)
                self._thread.start()
        try:
            yield follower
        finally:
            with self._lock:
                self._followers.discard(follower)

    def close(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _listen(self) -> None:
        listener = Listener(self._dsn, EVENTS)
        while not self._stopping.is_set():
            try:
                if listener.wait(HEAR_S) != []:
                    self._wake_all()
            except Unavailable:  # followers poll meanwhile, and meet the same error in their reads
                self._stopping.wait(RETRY_S)
        listener.close()

    def _wake_all(self) -> None:
        with self._lock:
            for follower in self._followers:
                follower.wake()
