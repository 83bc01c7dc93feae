"""The file of a bundle: a .tar.gz whose first two members say and sign what the others are. Read as if an enemy had written it:
plain files of known names only, each with the size and hash that were signed, or nothing at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from runtime_envs.bundles.gunzip import Gunzip
from runtime_envs.bundles.signing import Signature, SigningKey, Trust
from runtime_envs.errors import BUNDLE_INVALID, EnvironmentProblem

HEAD, SIGNATURE = "manifest.json", "signature.json"
NAME = re.compile(
    r"(environment\.yml|explicit\.txt|spec\.yml|lock\.json|pixi\.lock"
    r"|packages/(linux-64|noarch)/[A-Za-z0-9_][A-Za-z0-9._+!-]{0,150}\.(conda|tar\.bz2)"
    r"|wheels/[A-Za-z0-9_][A-Za-z0-9._+!-]{0,150}\.whl)"
)
BLOCK_BYTES = 512
PARTS = 2
"""As gzip: what is compressed, and what is stored."""
CHUNK_BYTES = 256 * 1024
"""Unpacked, hashed and written while it lies in a core's cache."""

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """`ratio`: of unpacked to packed bytes."""

    files: int = 4096
    bytes_: int = 64 * 1024**3
    head_bytes: int = 4 * 1024**2
    ratio: int = 100


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class File(_Model):
    size: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Head(_Model):
    """What is signed."""

    format: Literal["heliostat-environment"] = "heliostat-environment"
    version: Literal[1] = 1
    fingerprint: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    files: dict[str, File]


class _Signed(_Model):
    key: Annotated[str, StringConstraints(max_length=100)]
    signature: Annotated[str, StringConstraints(max_length=200)]


@dataclass(frozen=True)
class Opened:
    """`folder` holds the files of `head`; `signed_by`: whose key it was."""

    head: Head
    folder: Path
    signed_by: str


def refused(why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        BUNDLE_INVALID, f"Not a bundle that can be imported: {why}.",
        hint="Export it again with `heliostat env export`, and compare the sizes after the transfer.",
    )  # fmt: skip


# --- writing ---


def write_archive(target: Path, fingerprint: str, files: Mapping[str, Path], key: SigningKey) -> None:
    """Members in the order of names; the same files and key give the same bytes. Packages are stored as they are: they are
    compressed already."""
    head = Head(fingerprint=fingerprint, files={name: _file(path) for name, path in sorted(files.items())})
    said = head.model_dump_json().encode()
    signed = json.dumps(vars(key.sign(said))).encode()
    packed = {name: path for name, path in sorted(files.items()) if "/" in name}
    texts = {name: path.read_bytes() for name, path in sorted(files.items()) if name not in packed}
    with target.open("wb") as raw:
        with gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
            for name, data in {HEAD: said, SIGNATURE: signed, **texts}.items():
                _write_member(out, name, len(data), io.BytesIO(data))
        with gzip.GzipFile("", "wb", 0, raw, mtime=0) as out:
            for name, path in packed.items():
                with path.open("rb") as source:
                    _write_member(out, name, head.files[name].size, source)
            out.write(b"\0" * 2 * BLOCK_BYTES)


def _file(path: Path) -> File:
    with path.open("rb") as source:
        return File(size=path.stat().st_size, sha256=hashlib.file_digest(source, "sha256").hexdigest())


def _write_member(out: gzip.GzipFile, name: str, size: int, source: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    out.write(info.tobuf(tarfile.USTAR_FORMAT))
    while chunk := source.read(CHUNK_BYTES):
        out.write(chunk)
    out.write(b"\0" * (-size % BLOCK_BYTES))


# --- reading ---


def read_archive(source: IO[bytes], folder: Path, trust: Trust, limits: Limits | None = None) -> Opened:
    """Unpacks into `folder`, which the caller throws away when this raises: `environment_bundle_invalid`,
    `environment_bundle_untrusted`."""
    packed_bytes = source.seek(0, io.SEEK_END)
    source.seek(0)
    try:
        stream = io.BufferedReader(Gunzip(source, PARTS), CHUNK_BYTES)
        return _read(_Members(stream), folder, trust, (limits or Limits(), packed_bytes))
    except (EOFError, zlib.error) as error:
        raise refused(f"it cannot be unpacked ({error})") from None


def _read(members: _Members, folder: Path, trust: Trust, bounds: tuple[Limits, int]) -> Opened:
    limits, packed_bytes = bounds
    said = members.small(HEAD, limits.head_bytes)
    signed = _parsed(_Signed, members.small(SIGNATURE, BLOCK_BYTES), SIGNATURE)
    signer = trust.signer(Signature(signed.key, signed.signature), said)
    head = _parsed(Head, said, HEAD)
    _check_head(head, limits, packed_bytes)
    seen = set()
    for name, size in members:
        expected = head.files.get(name)
        if expected is None or name in seen:
            raise refused(f"{name!r} is {'there twice' if name in seen else 'not what was signed'}")
        if size != expected.size or members.unpack(size, folder / name) != expected.sha256:
            raise refused(f"{name} is not as it was signed")
        seen.add(name)
    if missing := head.files.keys() - seen:
        raise refused(f"{min(missing)} is missing")
    return Opened(head, folder, signer)


def _parsed(model: type[T], data: bytes, name: str) -> T:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise refused(f"{name}: {'.'.join(map(str, first['loc']))[:100]}: {first['msg']}") from None


def _check_head(head: Head, limits: Limits, packed_bytes: int) -> None:
    total = sum(file.size for file in head.files.values())
    if len(head.files) > limits.files:
        raise refused(f"it holds {len(head.files)} files, allowed are {limits.files}")
    if total > min(limits.bytes_, limits.ratio * packed_bytes):
        raise refused(f"{total} bytes unpacked are too many for {packed_bytes} packed")
    if strange := next((name for name in head.files if not NAME.fullmatch(name)), None):
        raise refused(f"it holds {strange[:200]!r}, which bundles do not")


class _Members:
    """The members of a tar stream, one after the other. Only the plain header that our writer makes: tarfile's reader would follow
    extended ones, which can ask for any amount of memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def small(self, name: str, limit: int) -> bytes:
        """The next member, which must be this one."""
        found, size = self._header()
        if found != name or size > limit:
            raise refused(f"{name} of at most {limit} bytes is not where it should be")
        data = self._exactly(size)
        self._exactly(-size % BLOCK_BYTES)
        return data

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Names and sizes; each must be unpacked before the next."""
        while True:
            name, size = self._header()
            if not name:
                return
            yield name, size

    def unpack(self, size: int, target: Path) -> str:
        """Its SHA-256."""
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            left = size
            while left:
                chunk = self._exactly(min(left, CHUNK_BYTES))
                digest.update(chunk)
                file.write(chunk)
                left -= len(chunk)
        self._exactly(-size % BLOCK_BYTES)
        return digest.hexdigest()

    def _header(self) -> tuple[str, int]:
        """Without a name at the end."""
        block = self._exactly(BLOCK_BYTES)
        if not block.strip(b"\0"):
            if self._stream.read(2 * BLOCK_BYTES).strip(b"\0") or self._stream.read(1):
                raise refused("something follows its end")
            return "", 0
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise refused(f"a header cannot be read ({error})") from None
        if info.type != tarfile.REGTYPE or info.linkname or info.size < 0:
            raise refused(f"{info.name[:200]!r} is not a plain file")
        return info.name, info.size

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise refused("it ends too early")
        return data
