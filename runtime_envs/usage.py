"""Which environments processes of this machine use, and how much disk all of them take."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from runtime_envs.fingerprint import FINGERPRINT
from runtime_envs.flock import held

PROC = Path("/proc")
DU_TIMEOUT_S = 600.0
USE_TIMEOUT_S = 60.0
"""Who looks whether it is in use holds the file for a moment."""
GONE = ": No such file or directory"


def in_use(root: Path) -> frozenset[str]:
    """Fingerprints of the environments that somebody is `using`, or whose interpreter runs: by executable (a conda prefix has its
    own) or by command line (a prefix of base `host` has a link to the platform's)."""
    folder = f"{root.absolute()}/envs/"
    names = (place.removeprefix(folder).partition("/")[0] for place in _commands() if place.startswith(folder))
    return frozenset(name for name in (*names, *_told(root)) if FINGERPRINT.fullmatch(name))


def using(root: Path, fingerprint: str) -> AbstractContextManager[int]:
    """It counts as in use meanwhile, whatever runs in it. Not its builder's lock: others may use it too."""
    return held(root / "locks" / f"{fingerprint}.use", USE_TIMEOUT_S, shared=True)


def _told(root: Path) -> Iterator[str]:
    for file in (root / "locks").glob("*.use"):
        try:
            with held(file, 0):
                continue
        except TimeoutError:
            yield file.stem


def _commands() -> Iterator[str]:
    for process in PROC.glob("[0-9]*"):
        try:
            yield (process / "cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            yield str((process / "exe").readlink())
        except OSError:
            continue  # it has ended, or is another user's


def disk_bytes(folder: Path) -> int:
    """Hard links counted once. Files that go meanwhile make du fail after it has counted all others: what it says holds. Raises
    CalledProcessError when anything else went wrong."""
    command = ["du", "--summarize", "--block-size=1", str(folder)]
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DU_TIMEOUT_S, env=environment)
    if not (done.returncode == 1 and done.stdout and all(line.endswith(GONE) for line in done.stderr.splitlines())):
        done.check_returncode()
    return int(done.stdout.split()[0])
