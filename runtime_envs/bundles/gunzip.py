"""The unpacked bytes of a .gz: gzip's own reader takes 8 KiB at a time, at three times the price for packages that are only stored."""

from __future__ import annotations

import io
import zlib
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

GZIP = 16 + zlib.MAX_WBITS
CHUNK_BYTES = 256 * 1024


class Gunzip(io.RawIOBase):
    """`source` is one gzip member after another, at most `parts` of them: thousands of empty ones would each cost a copy of what
    follows. Reading raises zlib.error for what is not gzip or not as its checksum says, EOFError for what ends too early."""

    def __init__(self, source: IO[bytes], parts: int) -> None:
        self._source = source
        self._parts_left = parts
        self._part = zlib.decompressobj(wbits=GZIP)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        into = memoryview(buffer)
        while packed := self._packed():
            unpacked = self._part.decompress(packed, len(into))
            if unpacked:
                into[: len(unpacked)] = unpacked
                return len(unpacked)
        if not self._part.eof:
            raise EOFError("it ends too early")
        return 0

    def _packed(self) -> bytes:
        """The next bytes for `_part`, which is a new one when the last has ended."""
        if not self._part.eof:
            return self._part.unconsumed_tail or self._source.read(CHUNK_BYTES)
        packed = self._part.unused_data or self._source.read(CHUNK_BYTES)
        if packed:
            self._parts_left -= 1
            if self._parts_left <= 0:
                raise zlib.error("it has too many parts")
            self._part = zlib.decompressobj(wbits=GZIP)
        return packed
