"""The manifest of a conda prefix. The installer has said what most files hold, so that they need not be read again."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime_envs.verify import sha256_of


def build_manifest(prefix: Path, known: Mapping[str, str]) -> dict[str, Any]:
    """As `verify.build_manifest`. `known`: SHA-256 by path from the prefix. By the way all files become readable to other users
    (the tenants' uids), and none becomes writable."""
    files: dict[str, list[Any]] = {}
    links: dict[str, str] = {}
    start = len(str(prefix)) + 1
    folders = [str(prefix)]
    while folders:
        folder = folders.pop()
        Path(folder).chmod(0o755)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.path[start:]
                if entry.is_symlink():
                    links[name] = str(Path(entry.path).readlink())
                elif entry.is_dir():
                    folders.append(entry.path)
                else:
                    status = entry.stat()
                    _make_readable(entry.path, status.st_mode)
                    files[name] = [status.st_size, status.st_mtime_ns, known.get(name) or sha256_of(Path(entry.path))]
    return {"files": files, "links": links}


def _make_readable(path: str, mode: int) -> None:
    wanted = 0o755 if mode & stat.S_IXUSR else 0o644
    if stat.S_IMODE(mode) != wanted:
        Path(path).chmod(wanted)
