"""Folders that a script has written: taken into custody, listed with their hashes, and let go of again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.protocol import MAX_MESSAGE_BYTES

STATE = ".heliostat.json"
"""In a checkpoint, beside the script's own files: step and metrics."""
CHUNK_BYTES = 1 << 20
MAX_LISTED_BYTES = MAX_MESSAGE_BYTES - 16 * 1024
"""Of names and hashes: they travel in one message, with the metrics."""


class Refused(Exception):
    """What a script offers and cannot be taken; the reason."""


class Nothing(Refused):
    def __init__(self) -> None:
        super().__init__("there is no file in it")


@dataclass(frozen=True)
class Position:
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def position_of(checkpoint: str | None) -> Position:
    """Where the run stood that wrote it; of no checkpoint: the start."""
    if checkpoint is None:
        return Position()
    return Position(**json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8")))


class Custody:
    """Checkpoints of one run, below `folder`: whole, named by their step, out of the script's way."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = folder / ".open"

    def open(self) -> Path:
        """A new, empty folder to write a checkpoint into."""
        shutil.rmtree(self._open, ignore_errors=True)
        self._open.mkdir(parents=True)
        return self._open

    def take(self, position: Position, source: Path | None = None) -> dict[str, Any]:
        """The fields of a `checkpoint` message, of the open folder or of `source`, which is moved. Raises Refused."""
        source = source or self._open
        if not _files(source):
            raise Nothing
        state = {"step": position.step, "metrics": position.metrics}
        (source / STATE).write_text(json.dumps(state), encoding="utf-8")
        hashes = hashes_of(source)
        target = self._folder / f"step-{position.step:08d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        source.rename(target)
        size = sum((target / name).stat().st_size for name in hashes)
        return {**state, "path": str(target), "bytes": size, "sha256": hashes}

    def prune(self, step: int) -> None:
        """The checkpoint of `step` is durable: what is older may go."""
        for path in self._folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) < step:
                shutil.rmtree(path, ignore_errors=True)

    def drop(self, step: int) -> None:
        shutil.rmtree(self._folder / f"step-{step:08d}", ignore_errors=True)


def hashes_of(folder: Path) -> dict[str, str]:
    """{file: sha256}. Raises Refused when there is nothing, or what cannot be taken over."""
    files = _files(folder)
    if not files:
        raise Nothing
    hashes = {path.relative_to(folder).as_posix(): _sha256(path) for path in files}
    if len(json.dumps(hashes)) > MAX_LISTED_BYTES:
        raise Refused(f"it has {len(files)} files, more than can be kept: put them into one archive")
    return hashes


def _files(folder: Path) -> list[Path]:
    """The regular files, sorted. Raises Refused for links and everything that is no file."""
    found = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.append(path)
            elif not stat.S_ISDIR(mode):
                raise Refused(f"{path.relative_to(folder)} is not a regular file")
    return sorted(found)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
