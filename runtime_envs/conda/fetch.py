"""Which packages of a lock a node must fetch, and fetching them (`fetch_process`) into the package cache. What is not there
afterwards the installer fetches itself: a little, old formats, what lies on a disk or in a store that is not reached by HTTP."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from runtime_envs.conda.engine import FETCH, Progress, ask
from runtime_envs.conda.lock import CondaLock, places_of

DOWNLOADS = "downloads"
"""Below a node's root: what has not arrived whole."""
WORTH_BYTES = 8 * 1024 * 1024
"""For less than this the installer alone is sooner than two processes."""


def fetch_packages(lock: CondaLock, names: Collection[str], root: Path, progress: Progress, keep_fd: int) -> None:
    """Blocks for seconds to minutes; `progress` gets {bytes, total}. Raises EnvironmentProblem
    (`environment_channel_failed`, `environment_disk_full`, `environment_build_failed`)."""
    cache, urls = root / "pkgs", places_of(lock.pixi)
    wanted: list[dict[str, Any]] = []
    for package in lock.conda:
        place, url = package.filename.removesuffix(".conda"), urls[package.filename][0]
        ours = package.filename.endswith(".conda") and url.startswith(("http://", "https://")) and package.size
        bundled = package.filename in lock.bundled
        if package.name in names and ours and not bundled and not (cache / place).exists():
            wanted.append({"url": url, "sha256": package.sha256, "size": package.size, "place": place})
    if sum(package["size"] for package in wanted) >= WORTH_BYTES:
        question = {"packages": wanted, "downloads": str(root / DOWNLOADS), "cache": str(cache)}
        ask(question, script=FETCH, progress=progress, keep_fd=keep_fd)
