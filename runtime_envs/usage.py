"""Which environments processes of this machine use, and how much disk all of them take."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from runtime_envs.fingerprint import FINGERPRINT

PROC = Path("/proc")
DU_TIMEOUT_S = 600.0
GONE = ": No such file or directory"


def in_use(root: Path) -> frozenset[str]:
    """Fingerprints of the environments whose interpreter runs: by executable (a conda prefix has its own) or by command line
    (a prefix of base `host` has a link to the platform's)."""
    folder = f"{root.absolute()}/envs/"
    names = (place.removeprefix(folder).partition("/")[0] for place in _commands() if place.startswith(folder))
    return frozenset(name for name in names if FINGERPRINT.fullmatch(name))


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
