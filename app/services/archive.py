"""A model version as one tar: deterministic, so that its hash can be told before its first byte is sent."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import HeliostatError
from cluster.storage.objects import CHUNK_BYTES, ObjectStore

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Archive:
    """`files`: name → sha256, under `prefix`; in the tar they lie under `folder`."""

    storage: ObjectStore
    prefix: str
    folder: str
    files: dict[str, str]

    def measure(self) -> tuple[str, int]:
        """sha256 and bytes of the tar. Raises `NotFound`, `HeliostatError` when a file is not what was recorded."""
        digest, size = hashlib.sha256(), 0
        for chunk in self.chunks():
            digest.update(chunk)
            size += len(chunk)
        return digest.hexdigest(), size

    def chunks(self) -> Iterator[bytes]:
        for name, sha256 in sorted(self.files.items()):
            yield from self._member(name, sha256)
        yield bytes(2 * BLOCK)

    def _member(self, name: str, sha256: str) -> Iterator[bytes]:
        key = f"{self.prefix}/{name}"
        size = self.storage.size(key)
        header = tarfile.TarInfo(f"{self.folder}/{name}")
        header.size, header.mode = size, 0o644
        yield header.tobuf(tarfile.PAX_FORMAT)
        digest = hashlib.sha256()
        with self.storage.reader(key) as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                yield chunk
        if digest.hexdigest() != sha256:
            raise HeliostatError(
                f"file {name} of the model is not what was stored (sha256 differs)",
                code="object_damaged",
                hint="Tell an operator: the object must be restored, or the job run again.",
            )
        yield bytes(-size % BLOCK)
