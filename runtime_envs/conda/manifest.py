"""The manifest of a conda prefix. The installer has said what most files hold, so that they need not be read again."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime_envs.verify import sha256_of


@dataclass(frozen=True)
class Manifest:
    """Or a part of one: as `verify.build_manifest` says. Paths from the prefix."""

    files: dict[str, list[Any]]
    links: dict[str, str]

    def __or__(self, other: Manifest) -> Manifest:
        return Manifest(self.files | other.files, self.links | other.links)


def describe(prefix: Path, names: Iterable[str], known: Mapping[str, str]) -> Manifest:
    """`known`: SHA-256 by path; others are read. By the way all files become readable to other users (the tenants' uids), and
    none becomes writable."""
    part = Manifest({}, {})
    for name in names:
        path = f"{prefix}/{name}"
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            part.links[name] = str(Path(path).readlink())
            continue
        _make_readable(path, status.st_mode)
        part.files[name] = [status.st_size, status.st_mtime_ns, known.get(name) or sha256_of(Path(path))]
    return part


def _make_readable(path: str, mode: int) -> None:
    wanted = 0o755 if mode & stat.S_IXUSR else 0o644
    if stat.S_IMODE(mode) != wanted:
        Path(path).chmod(wanted)
