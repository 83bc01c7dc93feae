"""What a child prints: from its pipe to numbered segments in storage, at most a few seconds late, with a short tail kept."""

from __future__ import annotations

import os
import select
import threading
import time

from cluster.storage.objects import ObjectStore

SEGMENT_BYTES = 64 * 1024
FLUSH_S = 2.0
TAIL_BYTES = 8 * 1024
_POLL_S = 0.2
_MAX_UNSTORED_BYTES = 4 * 1024**2


class ChildLogs:
    """Reads `fd` (and closes it) in a thread of its own. A storage that does not answer costs the oldest output, never
    the training."""

    def __init__(self, storage: ObjectStore, prefix: str, fd: int, max_bytes: int) -> None:
        self._storage = storage
        self._prefix = prefix
        self._fd = fd
        self._left = max_bytes
        self._buffer = bytearray()
        self._tail = bytearray()
        self._segment = 0
        self._since = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="child-logs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tail(self) -> list[str]:
        """The last lines; NUL characters replaced."""
        text = bytes(self._tail).decode(errors="replace").replace("\x00", "\N{REPLACEMENT CHARACTER}")
        return text.splitlines()[-20:]

    def close(self, timeout_s: float = 10.0) -> None:
        """To be called when the child has ended: takes what is in the pipe and writes the last segment."""
        self._stop.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._read_once():
                if len(self._buffer) >= SEGMENT_BYTES or self._is_due():
                    self._flush()
            self._flush()
        finally:
            os.close(self._fd)

    def _is_due(self) -> bool:
        return time.monotonic() - self._since >= FLUSH_S

    def _read_once(self) -> bool:
        """False at the end: of file, or of the child while somebody it left behind still holds the pipe."""
        readable, _, _ = select.select([self._fd], [], [], _POLL_S)
        if not readable:
            return not self._stop.is_set()
        data = os.read(self._fd, SEGMENT_BYTES)
        self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        kept = data[: self._left]
        if len(kept) < len(data) and self._left:
            kept += b"\n[more output was not kept: the limit is reached]\n"
        self._left = max(0, self._left - len(data))
        self._buffer += kept
        self._tail = (self._tail + data)[-TAIL_BYTES:]

    def _flush(self) -> None:
        self._since = time.monotonic()
        if not self._buffer:
            return
        try:
            self._storage.put_bytes(f"{self._prefix}/{self._segment:06d}.log", bytes(self._buffer))
        except OSError:  # kept for the next try
            del self._buffer[: max(0, len(self._buffer) - _MAX_UNSTORED_BYTES)]
            return
        self._segment += 1
        self._buffer.clear()
