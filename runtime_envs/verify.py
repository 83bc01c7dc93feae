"""Whether an environment on disk is still what was built: a manifest of every file, a quick check and a full one.

Light on imports: Ray's runtime-env agent loads it."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

READY = "READY"
MANIFEST = "manifest.json.gz"
PREFIX = "prefix"
CHUNK_BYTES = 1024 * 1024
CHUNK_FILES = 256
GZIP = 16 + zlib.MAX_WBITS


def is_ready(home: Path) -> bool:
    """`home`: the folder of one environment. Everything without READY is unfinished."""
    return (home / READY).is_file()


def build_manifest(prefix: Path) -> dict[str, Any]:
    """`files`: path → [size, mtime_ns, sha256]; `links`: path → target. Paths from the prefix."""
    files: dict[str, list[Any]] = {}
    links: dict[str, str] = {}
    for path in walk(prefix):
        name = path.relative_to(prefix).as_posix()
        if path.is_symlink():
            links[name] = str(path.readlink())
        else:
            status = path.stat()
            files[name] = [status.st_size, status.st_mtime_ns, sha256_of(path)]
    return {"files": files, "links": links}


def walk(folder: Path) -> Iterator[Path]:
    """Every file and symbolic link; links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in sorted(names))
        yield from (Path(parent, name) for name in sorted(folders) if Path(parent, name).is_symlink())


def quick_verify(home: Path) -> list[str]:
    """Files whose size or time of change is not the manifest's, by name; empty: none. Reads no contents."""
    manifest = _manifest(home)
    if manifest is None:
        return [MANIFEST]
    prefix = home / PREFIX
    damaged = [name for name, entry in manifest["files"].items() if _changed(f"{prefix}/{name}", entry)]
    return sorted(damaged + _changed_links(prefix, manifest["links"]))


def full_verify(home: Path) -> list[str]:
    """Files whose contents are not the manifest's, and files that it does not know (but for byte code, which Python may
    write when it runs with the right to)."""
    manifest = _manifest(home)
    if manifest is None:
        return [MANIFEST]
    prefix = home / PREFIX
    files = manifest["files"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        others = pool.map(lambda name: _other_contents(prefix / name, files[name]), files, chunksize=CHUNK_FILES)
        damaged = [name for name, other in zip(files, others, strict=True) if other]
    return sorted({*damaged, *_changed_links(prefix, manifest["links"]), *_unknown(prefix, manifest)})


def packed(manifest: bytes) -> bytes:
    """Its file: of JSON, as `build_manifest` says. 43,000 files: 2.6 MB."""
    packer = zlib.compressobj(1, wbits=GZIP)
    return packer.compress(manifest) + packer.flush()


def read_manifest(home: Path) -> bytes:
    """Its JSON. Raises OSError, and ValueError when it is not whole."""
    try:
        return zlib.decompress((home / MANIFEST).read_bytes(), wbits=GZIP)
    except zlib.error as error:
        raise ValueError(f"{home / MANIFEST}: {error}") from error


def _manifest(home: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads(read_manifest(home))
    except (OSError, ValueError):
        return None
    return manifest


def _changed(path: str, entry: list[Any]) -> bool:
    try:
        status = os.lstat(path)  # a tenth of the time of a Path, for tens of thousands of files
    except OSError:
        return True
    return status.st_mtime_ns != entry[1] or status.st_size != entry[0]


def _other_contents(path: Path, entry: list[Any]) -> bool:
    try:
        return path.is_symlink() or path.stat().st_size != entry[0] or sha256_of(path) != entry[2]
    except OSError:
        return True


def _changed_links(prefix: Path, links: dict[str, str]) -> list[str]:
    return [name for name, target in links.items() if _target(prefix / name) != target]


def _target(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def _unknown(prefix: Path, manifest: dict[str, Any]) -> list[str]:
    names = (path.relative_to(prefix).as_posix() for path in walk(prefix))
    known = manifest["files"].keys() | manifest["links"].keys()
    return [name for name in names if name not in known and not name.endswith(".pyc")]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
