"""Packages that came with a bundle, on a node: fetched from our storage into the environment's folder, where they stay for repairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from runtime_envs.conda.lock import CondaLock, LockedConda, with_places
from runtime_envs.errors import CHANNEL_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.lock import Lock, LockedPackage

FOLDER = "packages"

Fetch = Callable[[str, Path, str], None]
"""(key, target, SHA-256): writes the object to the file. Raises EnvironmentProblem."""


def no_storage(key: str, target: Path, sha256: str) -> None:
    raise EnvironmentProblem(
        CHANNEL_FAILED, f"{target.name} came with a bundle, and this node has no storage to fetch it from.",
        hint="Materialise it through Heliostat.", fixable_by="operator",
    )  # fmt: skip


def fetch_bundled(lock: CondaLock | Lock, home: Path, fetch: Fetch) -> None:
    """As a channel and a folder of wheels."""
    packages = [*(lock.conda if isinstance(lock, CondaLock) else ()), *lock.pip]
    for package in packages:
        if package.filename in lock.bundled:
            fetch(lock.bundled[package.filename], _place(home, package), package.sha256)


def _place(home: Path, package: LockedConda | LockedPackage) -> Path:
    folder = home / FOLDER / package.subdir if isinstance(package, LockedConda) else home / FOLDER
    return folder / package.filename


def pixi_on(home: Path, lock: CondaLock) -> str:
    """The lock for the installer."""
    urls = {one.filename: _place(home, one).as_uri() for one in lock.conda if one.filename in lock.bundled}
    return with_places(lock.pixi, urls) if urls else lock.pixi


def index_on(home: Path, lock: CondaLock | Lock, index: PipIndex) -> PipIndex:
    """For the pip part; nobody else is asked where all of it came along, for uv asks an index even for what it has."""
    folder = str(home / FOLDER)
    if lock.pip and all(package.filename in lock.bundled for package in lock.pip):
        return PipIndex(find_links=(folder,), offline=True)
    return replace(index, find_links=(*index.find_links, folder)) if lock.bundled else index
