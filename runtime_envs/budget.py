"""Keeps a node's environments within their share of the disk: the least recently used ones go, and then the cached packages that
no environment uses any more. What a job uses stays."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from runtime_envs.conda.fetch import DOWNLOADS
from runtime_envs.conda.prefix import Pair, cache_key, packages_of, stem
from runtime_envs.fingerprint import FINGERPRINT
from runtime_envs.flock import held
from runtime_envs.materialize import caches_lock, lock_file
from runtime_envs.usage import disk_bytes, in_use
from runtime_envs.verify import READY, is_ready

GRACE_S = 600.0
"""What was asked for so lately may be about to start."""


@dataclass(frozen=True)
class Budget:
    """`bytes_` of disk for environments and their caches together."""

    bytes_: int
    grace_s: float = GRACE_S


def keep(root: Path, budget: Budget, spare: Collection[str] = ()) -> list[str]:
    """Removes until the budget is met or nothing more may go; the fingerprints that went. `spare` stays in any case."""
    removed: list[str] = []
    used = disk_bytes(root) if root.is_dir() else 0
    for home in _oldest_first(root):
        if used <= budget.bytes_:
            break
        if _may_go(root, home, budget, spare) and remove(root, home.name):
            removed.append(home.name)
            prune(root)
            used = disk_bytes(root)
    return removed


def _oldest_first(root: Path) -> list[Path]:
    homes = [home for home in (root / "envs").glob("*") if FINGERPRINT.fullmatch(home.name)]
    return sorted(homes, key=_last_used)


def _last_used(home: Path) -> float:
    try:
        return (home / READY).stat().st_mtime
    except OSError:
        return 0.0  # unfinished


def _may_go(root: Path, home: Path, budget: Budget, spare: Collection[str]) -> bool:
    recent = time.time() - _last_used(home) < budget.grace_s
    return not recent and home.name not in spare and home.name not in in_use(root)


def remove(root: Path, fingerprint: str) -> bool:
    """False when somebody builds or repairs it. READY goes first: what is half removed is not there."""
    try:
        with held(lock_file(root, fingerprint), timeout_s=0):
            home = root / "envs" / fingerprint
            (home / READY).unlink(missing_ok=True)
            shutil.rmtree(home)
    except TimeoutError:
        return False
    return True


def prune(root: Path) -> None:
    """Removes packages and byte code that no environment uses, and what has arrived in part. Does nothing while an environment is
    being built."""
    try:
        with held(caches_lock(root), timeout_s=0):
            shutil.rmtree(root / DOWNLOADS, ignore_errors=True)
            used = _used_packages(root)
            _remove_others(root / "pkgs", {stem(filename) for filename, _ in used})
            keys = {cache_key(package) for package in used}
            for minor in (root / "bytecode").glob("*"):
                _remove_others(minor, keys)
    except TimeoutError:
        return


def _used_packages(root: Path) -> set[Pair]:
    homes = [home for home in (root / "envs").glob("*") if is_ready(home)]  # others are made anew in any case
    return {package for home in homes for package in packages_of(home)}


def _remove_others(folder: Path, kept: Collection[str]) -> None:
    for path in folder.glob("*"):
        if path.name.removesuffix(".lock") in kept or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
