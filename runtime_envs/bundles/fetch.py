"""Fetches the packages of a lock as files, each checked against its hash."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from packaging.tags import sys_tags

from runtime_envs.bundles.on_node import Fetch
from runtime_envs.conda.lock import CondaLock, LockedConda, places_of
from runtime_envs.errors import CHANNEL_FAILED, INDEX_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.uv import INHERITED

AT_ONCE = 8
TIMEOUT_S = 60.0
PIP_TIMEOUT_S = 1800.0
CHUNK_BYTES = 1024 * 1024
MAX_REASON_CHARS = 2000


@dataclass(frozen=True)
class Places:
    """`index`: None: this machine's pip settings. `stored`: what came with a bundle itself."""

    index: PipIndex | None
    stored: Fetch


def fetch_conda(lock: CondaLock, folder: Path, places: Places, *, whole: bool) -> dict[str, Path]:
    """`packages/<subdir>/<file>` → file below `folder`, of what the base lacks, or of all."""
    urls = places_of(lock.pixi)

    def fetch(package: LockedConda) -> Path:
        target = folder / f"{package.subdir}-{package.filename}"
        if package.filename in lock.bundled:
            places.stored(lock.bundled[package.filename], target, package.sha256)
        else:
            _download(package, urls[package.filename][0], target)
        return target

    wanted = [package for package in lock.conda if whole or package.name not in lock.base.packages]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = list(pool.map(fetch, wanted))
    return {f"packages/{package.subdir}/{package.filename}": file for package, file in zip(wanted, files, strict=True)}


def _download(package: LockedConda, url: str, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as source, target.open("wb") as file:
            for chunk in iter(partial(source.read, CHUNK_BYTES), b""):
                digest.update(chunk)
                file.write(chunk)
    except (urllib.error.URLError, OSError) as error:
        raise _channel_failed(f"{package.filename}: {error}") from None
    if digest.hexdigest() != package.sha256:
        raise _channel_failed(f"{package.filename} is another file than the lock says")


def _channel_failed(why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        CHANNEL_FAILED, f"The conda channel did not deliver: {why}",
        hint="Try again; if it stays, the operator should check the channel.", fixable_by="operator",
    )  # fmt: skip


def fetch_wheels(lock: dict[str, Any], folder: Path, places: Places) -> dict[str, Path]:
    """`wheels/<file>` → file."""
    files = {package["filename"]: folder / "wheels" / package["filename"] for package in lock["pip"]}
    bundled = lock.get("bundled", {})
    wanted = [package for package in lock["pip"] if package["filename"] not in bundled]
    for package in lock["pip"]:
        if package["filename"] in bundled:
            places.stored(bundled[package["filename"]], files[package["filename"]], package["sha256"])
    if wanted:
        _pip_download(lock["python"], wanted, folder / "wheels", places.index or machine_index())
    return {f"wheels/{name}": file for name, file in files.items()}


def _pip_download(python: str, wanted: Sequence[dict[str, Any]], folder: Path, index: PipIndex) -> None:
    """By pip: uv has no download."""
    pins = [f"{package['name']}=={package['version']} --hash=sha256:{package['sha256']}" for package in wanted]
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("\n".join([*index.lines(), *pins]) + "\n", encoding="utf-8")
        done = subprocess.run(
            [*_pip(python, index), "--requirement", requirements, "--dest", folder],
            env={name: value for name, value in os.environ.items() if name in INHERITED},
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
    if done.returncode != 0 or not all((folder / package["filename"]).is_file() for package in wanted):
        raise EnvironmentProblem(
            INDEX_FAILED, f"The pip packages cannot be fetched: {done.stderr.strip()[-MAX_REASON_CHARS:]}",
            hint="Try again; if it stays, the operator should check the package index.", fixable_by="operator",
        )  # fmt: skip


def _pip(python: str, index: PipIndex) -> list[str | Path]:
    """For the Python of the lock, not the one that runs pip."""
    platforms = dict.fromkeys(tag.platform for tag in sys_tags())
    target = ["--python-version", python, *(word for name in platforms for word in ("--platform", name))]
    hosts = [word for host in index.trusted_hosts for word in ("--trusted-host", host)]
    certificate = [*(["--cert", index.cert] if index.cert else []), *hosts]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    return [sys.executable, "-m", "pip", "download", *options, *target, *certificate]
