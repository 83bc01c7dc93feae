"""Folders that are whole or not there: written aside, checked, flushed to disk, then named."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from safetensors import safe_open

from trainers.child.data import file_sha256


def aside(folder: Path) -> Path:
    """Where `folder` is written before it gets its name; what an earlier try left there is gone."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def publish(temporary: Path, folder: Path) -> dict[str, str]:
    """Checks what lies in `temporary`, flushes it and names it; {file: sha256} of what was read back from disk."""
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors makes its files readable by their owner only
        flush(path)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as weights:
                weights.keys()
    hashes = {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files}
    discard(folder)
    temporary.rename(folder)
    flush(folder.parent)
    return hashes


def discard(folder: Path) -> None:
    """Takes the name away first: who dies while it deletes leaves no half folder under it."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
