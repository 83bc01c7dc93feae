"""Takes over what a child wrote, which is hostile: regular files below its output folder only, no links, a size limit, and
the stored bytes have the hash that was announced."""

from __future__ import annotations

import io
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from cluster.errors import JobFailure
from cluster.storage.objects import ObjectStore

MANIFEST = "manifest.json"


class Upload:
    """From one output folder to storage."""

    def __init__(self, storage: ObjectStore, output: Path, max_bytes: int) -> None:
        self._storage = storage
        self._output = output
        self._max_bytes = max_bytes

    def store(
        self, folder: str, sha256: dict[str, str], prefix: str, told: Callable[[int], None] = lambda size: None
    ) -> dict[str, str]:
        """Stores the named files of `folder` under `prefix`, the manifest last; {name: sha256}. `told`: of each piece that was
        read, its bytes; what it raises ends the upload. Raises `JobFailure` (`output_refused`), OSError when the storage does
        not take it."""
        inside = self._relative(folder)
        left = self._max_bytes
        for name, announced in sorted(sha256.items()):
            with _open_below(self._output, inside / _plain(name), told) as source:
                left -= os.fstat(source.fileno()).st_size
                if left < 0:
                    raise _refused(f"it has more than {self._max_bytes} bytes")
                stored = self._storage.put_stream(f"{prefix}/{name}", source)
            if stored != announced:
                self._storage.delete(f"{prefix}/{name}")
                raise _refused(f"{name} does not have the content that was announced")
        self._storage.put_bytes(f"{prefix}/{MANIFEST}", json.dumps(sha256, sort_keys=True).encode())
        return dict(sha256)

    def _relative(self, folder: str) -> PurePosixPath:
        try:
            inside = PurePosixPath(folder).relative_to(self._output.as_posix())
        except ValueError:
            raise _refused("it does not lie in the output folder") from None
        return PurePosixPath(*_plain(inside.as_posix()).parts)


def _plain(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\x00" in name:
        raise _refused("a file name leaves the folder")
    return path


class _Told(io.BufferedReader):
    """A file that tells of each piece that is read."""

    def __init__(self, fd: int, told: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(fd, "rb"))
        self._told = told

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._told(len(data))
        return data


@contextmanager
def _open_below(root: Path, name: PurePosixPath, told: Callable[[int], None]) -> Iterator[IO[bytes]]:
    """Opened step by step without following links, so that nothing can be swapped in between look and read."""
    with ExitStack() as opened:
        try:
            folder = _opened(opened, os.open(root, os.O_RDONLY | os.O_DIRECTORY))
            for part in name.parts[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                folder = _opened(opened, os.open(part, flags, dir_fd=folder))
            # A pipe would block the open, a device could do anything.
            fd = os.open(name.parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError as error:
            raise _refused(f"{name} cannot be opened as a regular file ({error.strerror})") from None
        source = opened.enter_context(_Told(fd, told))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _refused(f"{name} is not a regular file")
        yield source


def _opened(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _refused(why: str) -> JobFailure:
    return JobFailure(
        f"what the training wrote was not taken over: {why}",
        code="output_refused",
        hint="Training code must write regular files, without links, below its output folder.",
    )
