"""Whether an environment on disk is still what was built: a manifest of every file, a quick check and a full one.

Light on imports: Ray's runtime-env agent loads it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runtime_envs.check_process import GZIP, PARTS

READY = "READY"
MANIFEST = "manifest.json.gz"
PREFIX = "prefix"
CHUNK_BYTES = 1024 * 1024
PROCESS = Path(__file__).with_name("check_process.py")
FILES_A_PROCESS = 1000
"""Fewer are not worth another one."""


def is_ready(home: Path) -> bool:
    """`home`: the folder of one environment. Everything without READY is unfinished."""
    return (home / READY).is_file()


def build_manifest(prefix: Path) -> dict[str, Any]:
    """`files`: path → [size, mtime_ns, sha256]; `links`: path → target. Paths from the prefix."""
    files: dict[str, list[Any]] = {}
    links: dict[str, str] = {}
    for name in names_in(prefix):
        path = prefix / name
        if path.is_symlink():
            links[name] = str(path.readlink())
        else:
            status = path.stat()
            files[name] = [status.st_size, status.st_mtime_ns, sha256_of(path)]
    return {"files": files, "links": links}


def walk(folder: Path) -> Iterator[Path]:
    """Every file and symbolic link; links to folders are not followed."""
    yield from (folder / name for name in names_in(folder))


def names_in(folder: Path) -> Iterator[str]:
    """Of every file and symbolic link, from `folder`."""
    start = len(str(folder)) + 1
    for parent, folders, names in os.walk(folder):
        below = f"{parent[start:]}/" if len(parent) > start else ""
        yield from (below + name for name in sorted(names))
        yield from (below + name for name in sorted(folders) if os.path.islink(f"{parent}/{name}"))  # noqa: PTH114


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
    write when it runs with the right to). Raises CalledProcessError when a process that hashes was ended."""
    prefix = home / PREFIX
    with ExitStack() as stack:
        try:
            file = stack.enter_context((home / MANIFEST).open("rb"))
            manifest = _parsed(file.read())
        except (OSError, ValueError):
            return [MANIFEST]
        if not prefix.is_dir():
            return sorted([*manifest["files"], *manifest["links"]])
        started = _start_hashing(stack, prefix, file.fileno(), len(manifest["files"]))
        others = [*_changed_links(prefix, manifest["links"]), *_unknown(prefix, manifest)]
        damaged = {name for process in started for name in _answer(process)}
    return sorted({*damaged, *others})


def set_times(home: Path, spare: Collection[str]) -> list[str]:
    """Of files that have another time of change than the manifest says, and whose contents are right: all but `spare`. Their names."""
    wrong = sorted({*quick_verify(home)} - {*spare})
    times = (_manifest(home) or {}).get("files", {}) if wrong else {}
    for name in wrong:
        os.utime(home / PREFIX / name, ns=(times[name][1], times[name][1]))
    return wrong


def _start_hashing(stack: ExitStack, prefix: Path, manifest: int, files: int) -> list[subprocess.Popen[bytes]]:
    """Each takes the next part when it is done with one: on a busy machine they are not equally fast."""
    parts, writer = os.pipe()
    stack.callback(os.close, parts)
    os.write(writer, bytes(range(PARTS)))
    os.close(writer)
    count = max(1, min(os.cpu_count() or 1, files // FILES_A_PROCESS))
    command = [sys.executable, "-I", "-S", str(PROCESS), str(prefix), str(manifest), str(parts)]
    return [
        stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=(manifest, parts)))
        for _ in range(count)
    ]


def _answer(process: subprocess.Popen[bytes]) -> list[str]:
    answer, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    damaged: list[str] = json.loads(answer)
    return damaged


def packed(manifest: bytes) -> bytes:
    """Its file: of JSON, as `build_manifest` says. 43,000 files: 2.6 MB."""
    packer = zlib.compressobj(1, wbits=GZIP)
    return packer.compress(manifest) + packer.flush()


def read_manifest(home: Path) -> bytes:
    """Its JSON. Raises OSError, and ValueError when it is not whole."""
    return _unpacked((home / MANIFEST).read_bytes())


def _manifest(home: Path) -> dict[str, Any] | None:
    try:
        return _parsed((home / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None


def _parsed(packed: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    manifest: dict[str, Any] = json.loads(_unpacked(packed))
    return manifest


def _unpacked(packed: bytes) -> bytes:
    try:
        return zlib.decompress(packed, wbits=GZIP)
    except zlib.error as error:
        raise ValueError(f"the manifest cannot be unpacked: {error}") from error


def _changed(path: str, entry: list[Any]) -> bool:
    try:
        status = os.lstat(path)  # a tenth of the time of a Path, for tens of thousands of files
    except OSError:
        return True
    return status.st_mtime_ns != entry[1] or status.st_size != entry[0]


def _changed_links(prefix: Path, links: dict[str, str]) -> list[str]:
    return [name for name, target in links.items() if _target(prefix / name) != target]


def _target(path: Path) -> str | None:
    try:
        return str(path.readlink())
    except OSError:
        return None


def _unknown(prefix: Path, manifest: dict[str, Any]) -> list[str]:
    files, links = manifest["files"], manifest["links"]
    return [name for name in names_in(prefix) if name not in files and name not in links and not name.endswith(".pyc")]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
