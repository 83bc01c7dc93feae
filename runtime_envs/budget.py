"""Keeps a node's environments within their share of the disk: the least recently used ones go, and then the cached packages that
no environment uses any more. What a job uses stays."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from runtime_envs.conda.fetch import DOWNLOADS
from runtime_envs.conda.prefix import Pair, cache_key, packages_of, stem
from runtime_envs.fingerprint import FINGERPRINT
from runtime_envs.flock import held
from runtime_envs.materialize import caches_lock, lock_file
from runtime_envs.usage import disk_bytes, in_use
from runtime_envs.uv import drop_unused
from runtime_envs.verify import READY, is_ready

GRACE_S = 600.0
"""What was asked for so lately may be about to start."""


@dataclass(frozen=True)
class Budget:
    """`bytes_` of disk for environments and their caches together."""

    bytes_: int
    grace_s: float = GRACE_S


def keep(root: Path, budget: Budget, spare: Collection[str] = ()) -> list[str]:
    """Removes until the budget is met or nothing more may go; the fingerprints that went. `spare` stays in any case. While
    somebody builds, nothing goes: what an environment shares with the caches is freed with them only."""
    removed: list[str] = []
    if not root.is_dir() or disk_bytes(root) <= budget.bytes_:
        return removed
    homes = iter(_oldest_first(root))
    while prune(root) and disk_bytes(root) > budget.bytes_:
        gone = next((home.name for home in homes if _take(root, home, budget, spare)), None)
        if gone is None:
            break
        removed.append(gone)
    return removed


def _take(root: Path, home: Path, budget: Budget, spare: Collection[str]) -> bool:
    """Asked twice: without the lock, which others would have to wait for, and when nobody can begin to use it."""
    may_go = partial(_may_go, root, home, budget, spare)
    return may_go() and remove(root, home.name, may_go)


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


def remove(root: Path, fingerprint: str, may_go: Callable[[], bool] = lambda: True) -> bool:
    """False when somebody builds or repairs it, or `may_go` says so under its lock. READY goes first: what is half removed is not
    there."""
    home = root / "envs" / fingerprint
    try:
        with held(lock_file(root, fingerprint), timeout_s=0):
            if not home.exists() or not may_go():
                return False
            (home / READY).unlink(missing_ok=True)
            shutil.rmtree(home)
    except TimeoutError:
        return False
    return True


def prune(root: Path) -> bool:
    """Removes packages, wheels and byte code that no environment uses, and what was left unfinished. False, and nothing done, while
    somebody builds."""
    try:
        with held(caches_lock(root), timeout_s=0):
            _sweep(root)
            shutil.rmtree(root / DOWNLOADS, ignore_errors=True)
            used = _used_packages(root)
            _remove_others(root / "pkgs", {stem(filename) for filename, _ in used})
            keys = {cache_key(package) for package in used}
            for minor in (root / "bytecode").glob("*"):
                _remove_others(minor, keys)
            drop_unused(root / "uv-cache")
    except TimeoutError:
        return False
    return True


def _used_packages(root: Path) -> set[Pair]:
    """Of a damaged lock nothing is known: what it names is fetched again when it is needed."""
    homes = (home for home in (root / "envs").glob("*") if is_ready(home))  # others are made anew in any case
    return {package for home in homes for package in packages_of(home)}


def sweep(root: Path) -> None:
    """Removes what those left who were killed. Does nothing while somebody builds."""
    with suppress(OSError), held(caches_lock(root), timeout_s=0):  # a full disk, too: a node starts all the same
        _sweep(root)


def _sweep(root: Path) -> None:
    for folder in (*root.glob("repair-*"), *root.glob("bytecode/*/.new-*"), *root.glob("uv-cache/.tmp*")):
        shutil.rmtree(folder, ignore_errors=True)


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
