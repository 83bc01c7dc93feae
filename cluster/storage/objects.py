"""All of Heliostat's bytes pass through here: objects under string keys in a local folder or S3 (pyarrow.fs).

An object appears whole or not at all; a folder is a prefix with one object a file, its manifest is {file: sha256}."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pyarrow import fs

from cluster.errors import Conflict, NotFound

CHUNK_BYTES = 1024 * 1024


class ObjectStore:
    """`url`: a folder, file:///… or s3://bucket/prefix (credentials and endpoint from the usual AWS variables)."""

    def __init__(self, url: str) -> None:
        if "://" in url:
            self._fs, self._root = fs.FileSystem.from_uri(url)
        else:
            self._fs, self._root = fs.LocalFileSystem(), str(Path(url).absolute())
        self._local = isinstance(self._fs, fs.LocalFileSystem)

    def put_file(self, key: str, path: Path) -> str:
        """Stores the file; its sha256 in hex."""
        with path.open("rb") as source:
            return self.put_stream(key, source)

    def put_bytes(self, key: str, data: bytes) -> str:
        with self.writer(key) as sink:
            sink.write(data)
        return hashlib.sha256(data).hexdigest()

    def put_stream(self, key: str, source: IO[bytes]) -> str:
        digest = hashlib.sha256()
        with self.writer(key) as sink:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
        return digest.hexdigest()

    @contextmanager
    def writer(self, key: str) -> Iterator[Any]:
        """A binary sink; the object is there when the block ends without an exception."""
        path = self._path(key)
        aside = f"{path}.{secrets.token_hex(6)}.partial" if self._local else path
        if self._local:
            self._fs.create_dir(str(PurePosixPath(path).parent), recursive=True)
        sink = self._fs.open_output_stream(aside)
        try:
            yield sink
        except BaseException:
            sink.close()  # completes an upload to S3, which pyarrow cannot abort (and would complete when it is collected)
            self._fs.delete_file(aside)
            raise
        sink.close()
        if self._local:
            _sync(Path(aside))  # a row will name the object: it must survive a power cut as the row does
            self._fs.move(aside, path)
            _sync(Path(path).parent)

    @contextmanager
    def reader(self, key: str) -> Iterator[Any]:
        """A binary stream. Raises `NotFound`."""
        try:
            stream = self._fs.open_input_stream(self._path(key))
        except FileNotFoundError:
            raise NotFound(f"object {key} is not in storage", code="object_missing") from None
        with stream:
            yield stream

    def read_bytes(self, key: str) -> bytes:
        with self.reader(key) as stream:
            data: bytes = stream.read()
            return data

    def get_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Writes the object to `path` (aside, then renamed). Raises `NotFound`, `Conflict` when the hash differs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}.partial")
        digest = hashlib.sha256()
        try:
            with self.reader(key) as source, aside.open("wb") as sink:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    sink.write(chunk)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise Conflict(
                    f"object {key} does not have the content that was recorded (sha256 differs)",
                    code="object_damaged",
                    hint="Restore it from a backup, or upload it again.",
                    fixable_by="operator",
                )
            aside.chmod(0o644)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)

    def exists(self, key: str) -> bool:
        return bool(self._fs.get_file_info(self._path(key)).type == fs.FileType.File)

    def size(self, key: str) -> int:
        info = self._fs.get_file_info(self._path(key))
        if info.type != fs.FileType.File:
            raise NotFound(f"object {key} is not in storage", code="object_missing")
        return int(info.size)

    def keys(self, prefix: str) -> list[str]:
        """All keys under a prefix (a folder), sorted; unfinished writes are left out."""
        selector = fs.FileSelector(self._path(prefix), recursive=True, allow_not_found=True)
        root = self._path("") + "/"
        found = [info.path for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        return sorted(path.removeprefix(root) for path in found if not path.endswith(".partial"))

    def delete_prefix(self, prefix: str) -> None:
        if self._fs.get_file_info(self._path(prefix)).type == fs.FileType.Directory:
            self._fs.delete_dir(self._path(prefix))

    def delete(self, key: str) -> None:
        if self.exists(key):
            self._fs.delete_file(self._path(key))

    def put_folder(self, prefix: str, folder: Path) -> dict[str, str]:
        """Stores every regular file under `folder`; {relative name: sha256}."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        names = [path.relative_to(folder).as_posix() for path in files]
        return {name: self.put_file(f"{prefix}/{name}", path) for name, path in zip(names, files, strict=True)}

    def get_folder(self, prefix: str, folder: Path, files: dict[str, str]) -> None:
        """Writes the named files (name → sha256) below `folder`, verified."""
        for name, sha256 in files.items():
            self.get_file(f"{prefix}/{name}", folder / name, sha256)

    def _path(self, key: str) -> str:
        parts = PurePosixPath(key).parts
        if key.startswith("/") or ".." in parts:
            raise ValueError(f"not an object key: {key!r}")
        return f"{self._root}/{key}" if key else self._root


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def folder_sha256(files: dict[str, str]) -> str:
    """One hash for a folder: of its sorted names and hashes."""
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
