"""The driver's writes to the database, in order, by one thread. While the database is down they wait in memory: what a dead
driver loses lies after the last durable checkpoint and is computed again."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from cluster.errors import Fenced, HeliostatError, Unavailable

Write = Callable[[], object]
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0


class RecordWriter:
    """`on_fenced`: another attempt owns the job; nothing more is written. `on_refused`: the database does not take a value, however
    often it is asked; what comes after it is written. `on_broken`: a write failed in a way that nobody foresaw."""

    def __init__(
        self,
        capacity: int,
        on_fenced: Callable[[], None],
        on_refused: Callable[[HeliostatError], None],
        on_broken: Callable[[], None],
    ) -> None:
        self._queue: queue.Queue[Write | None] = queue.Queue(maxsize=capacity)
        self._on_fenced = on_fenced
        self._on_refused = on_refused
        self._on_broken = on_broken
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, write: Write) -> None:
        """Blocks when too much waits: in the end that holds up the training."""
        while not self._abandoned.is_set():
            try:
                self._queue.put(write, timeout=1.0)
                return
            except queue.Full:
                continue

    def close(self) -> None:
        """Returns when everything is written, however long the database is down, or after `abandon`."""
        self.submit(lambda: None)
        self._put_end()
        self._thread.join()

    def abandon(self) -> None:
        """Nothing more is written."""
        self._abandoned.set()

    def _put_end(self) -> None:
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.2)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        clean = False
        try:
            while (write := self._queue.get()) is not None:
                self._write(write)
            clean = True
        except Fenced:
            clean = True
            self._on_fenced()
        finally:
            self._abandoned.set()
            if not clean:
                self._on_broken()

    def _write(self, write: Write) -> None:
        wait_s = _FIRST_WAIT_S
        while not self._abandoned.is_set():
            try:
                write()
                return
            except Unavailable:
                self._abandoned.wait(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            except Fenced:
                raise
            except HeliostatError as error:
                self._on_refused(error)
                return
