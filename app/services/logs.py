"""A job's log as one text: its segments in storage, in order, by byte offset."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.storage.objects import CHUNK_BYTES, ObjectStore

SEGMENT = re.compile(r"/a(?P<attempt>\d+)/r(?P<rank>\d+)/(?P<number>\d+)\.log$")
MAX_TAIL_BYTES = 1024 * 1024


def logs_prefix(tenant: str, job: str) -> str:
    return f"tenants/{tenant}/jobs/{job}/logs"


@dataclass(frozen=True)
class Log:
    """One rank of one attempt. `segments`: keys and sizes in order; a segment never changes once it is there."""

    storage: ObjectStore
    segments: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.segments)

    def read(self, offset: int) -> Iterator[bytes]:
        """From `offset` on."""
        start = 0
        for key, size in self.segments:
            if start + size > offset:
                with self.storage.reader(key) as source:
                    source.read(max(0, offset - start))
                    while chunk := source.read(CHUNK_BYTES):
                        yield chunk
            start += size

    def tail_offset(self, lines: int) -> int:
        """Where the last `lines` lines begin; looks back a mebibyte at most."""
        if lines == 0:
            return self.size
        begin = max(0, self.size - MAX_TAIL_BYTES)
        text = b"".join(self.read(begin))
        position = len(text) - text.endswith(b"\n")
        for _ in range(lines):
            position = text.rfind(b"\n", 0, position)
            if position < 0:
                return begin
        return begin + position + 1


def attempts(storage: ObjectStore, tenant: str, job: str) -> list[int]:
    """Attempts that have written something."""
    found = (SEGMENT.search(key) for key in storage.keys(logs_prefix(tenant, job)))
    return sorted({int(match["attempt"]) for match in found if match})


def open_log(storage: ObjectStore, place: tuple[str, str], attempt: int, rank: int) -> Log:
    """`place`: tenant and job. Without segments: empty."""
    keys = storage.keys(f"{logs_prefix(*place)}/a{attempt}/r{rank}")
    segments = tuple((key, storage.size(key)) for key in keys if SEGMENT.search(key))
    return Log(storage, segments)
