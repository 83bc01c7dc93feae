"""Reads an uploaded archive of code, which is hostile until it was read to its end: all of it is taken, or nothing.

.tar.gz (.tar too) and .zip: regular files below one folder, no links, no devices, no name twice, limits on everything."""

from __future__ import annotations

import gzip
import hashlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cluster.errors import InvalidRequest

CHUNK_BYTES = 1 << 20
MIB = 1 << 20
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"


@dataclass(frozen=True)
class Limits:
    """Of one archive. `ratio`: unpacked to packed, from `small_bytes` on."""

    files: int = 2000
    bytes: int = 512 * MIB
    ratio: int = 100
    small_bytes: int = 16 * MIB
    name_chars: int = 240
    header_bytes: int = 64 * 1024
    directory_bytes: int = MIB
    """Of a zip's list of contents, which is read as a whole."""


@dataclass(frozen=True)
class Unpacked:
    """`files`: name → (where it lies now, sha256, bytes)."""

    files: dict[str, tuple[Path, str, int]]

    @property
    def sha256(self) -> dict[str, str]:
        return {name: sha256 for name, (_, sha256, _) in self.files.items()}

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.files.values())


def refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the archive is refused: {why}",
        code="archive_refused",
        param="file",
        hint="Send a .tar.gz or .zip with the regular files of your project (`tar czhf code.tar.gz -C FOLDER .`).",
    )


def unpack(archive: IO[bytes], folder: Path, limits: Limits | None = None) -> Unpacked:
    """The files, under names of our own in `folder`, which is left with what was written when `InvalidRequest`
    (`archive_refused`) is raised."""
    limits = limits or Limits()
    archive.seek(0, 2)
    packed = archive.tell()
    writer = _Writer(folder, limits, min(limits.bytes, max(packed * limits.ratio, limits.small_bytes)))
    archive.seek(0)
    start = archive.read(4)
    archive.seek(0)
    try:
        for name, source in _zipped(archive, limits) if start == ZIP else _tarred(archive, start, limits):
            writer.add(name, source)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise refused(f"it cannot be read ({error})") from None
    return writer.done()


class _Writer:
    def __init__(self, folder: Path, limits: Limits, most_bytes: int) -> None:
        self._folder = folder
        self._limits = limits
        self._left = most_bytes
        self._most = most_bytes
        self._files: dict[str, tuple[Path, str, int]] = {}

    def add(self, name: str, source: IO[bytes]) -> None:
        plain = _plain(name, self._limits)
        if plain in self._files:
            raise refused(f"{plain[:80]!r} is in it twice")
        if len(self._files) >= self._limits.files:
            raise refused(f"it has more than {self._limits.files} files")
        path, digest, size = self._folder / str(len(self._files)), hashlib.sha256(), 0
        with path.open("wb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                self._left -= len(chunk)
                if self._left < 0:
                    raise refused(f"unpacked, it has more than {self._most >> 20} MiB")
                digest.update(chunk)
                sink.write(chunk)
        self._files[plain] = (path, digest.hexdigest(), size)

    def done(self) -> Unpacked:
        if not self._files:
            raise refused("it holds no file")
        folders = {str(parent) for name in self._files for parent in PurePosixPath(name).parents}
        both = sorted(folders & self._files.keys())
        if both:
            raise refused(f"{both[0][:80]!r} is a file and a folder")
        return Unpacked(self._files)


def _plain(name: str, limits: Limits) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise refused(f"the name {name[:80]!r} leaves its folder")
    plain = str(path)
    if len(plain) > limits.name_chars or not plain.isprintable():
        raise refused(f"the name {plain[:80]!r} is too long, or has characters that cannot be printed")
    return plain


def _check_folder(name: str, limits: Limits) -> None:
    """Folders are made for the files in them; an archive of `.` names that one too."""
    if PurePosixPath(name).parts:
        _plain(name, limits)


# ── tar ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _tarred(archive: IO[bytes], start: bytes, limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    stream: Any = gzip.GzipFile(fileobj=archive, mode="rb") if start.startswith(GZIP) else archive
    bounded: Any = _Bounded(stream, limits)
    with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_checked_header(limits)) as tar:
        for member in tar:
            if member.isdir():
                _check_folder(member.name, limits)
                continue
            source = tar.extractfile(member)
            if source is None:
                raise refused(f"{member.name[:80]!r} is no regular file")
            yield member.name, source


class _Bounded:
    """Counts what is unpacked, headers and what is skipped too."""

    def __init__(self, stream: IO[bytes], limits: Limits) -> None:
        self._stream = stream
        self._left = limits.bytes + limits.files * limits.header_bytes

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise refused("unpacked, it is too large")
        return data


def _checked_header(limits: Limits) -> type[tarfile.TarInfo]:
    """tarfile reads long names and other attributes whole into memory: here their size is looked at first."""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> tarfile.TarInfo:  # type: ignore[override]
            header = super().frombuf(buf, encoding, errors)
            attributes = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
            if header.type in attributes:
                if header.size > limits.header_bytes:
                    raise refused("it has a header that is too large")
            elif header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
                raise refused(f"{header.name[:80]!r} is no regular file (links and devices are not taken)")
            return header

    return Header


# ── zip ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_END = struct.Struct("<4s4H2LH")
_END_SIGN, _END64_SIGN = b"PK\x05\x06", b"PK\x06\x07"


def _zipped(archive: IO[bytes], limits: Limits) -> Iterator[tuple[str, IO[bytes]]]:
    _check_directory(archive, limits)
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or member.flag_bits & 1:
                raise refused(f"{member.filename[:80]!r} is encrypted, or no regular file (links are not taken)")
            if member.is_dir():
                _check_folder(member.filename, limits)
                continue
            with packed.open(member) as source:
                yield member.filename, source


def _check_directory(archive: IO[bytes], limits: Limits) -> None:
    """zipfile reads the list of contents whole into memory."""
    archive.seek(0, 2)
    archive.seek(max(0, archive.tell() - _END.size - 0xFFFF))
    tail = archive.read()
    archive.seek(0)
    place = tail.rfind(_END_SIGN)
    if place < 0 or len(tail) - place < _END.size:
        raise refused("it has no list of contents")
    size = _END.unpack_from(tail, place)[5]
    if size > limits.directory_bytes or _END64_SIGN in tail[max(0, place - 20) : place]:
        raise refused(f"its list of contents is too large (at most {limits.files} files)")
