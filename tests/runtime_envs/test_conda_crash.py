"""SIGKILL at random points of a build: the next one finishes the work, and nothing half-made is ever handed out."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders_channel import conda_yml

from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.fingerprint import identity

pytestmark = pytest.mark.integration

BUILD = """
import json, sys
from pathlib import Path
from runtime_envs.environments import Environments
from runtime_envs.index import PipIndex
root, wheels, lock = sys.argv[1:]
print("go", flush=True)
Environments(Path(root), PipIndex(find_links=(wheels,), offline=True)).materialize(json.loads(lock))
"""
KILLS = 20


def start_build(root: Path, wheels: Path, lock: dict[str, Any]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(root), str(wheels), json.dumps(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    return process


def test_killed_at_twenty_points(tmp_path: Path, wheels: Path, places: CondaPlaces) -> None:
    """The first builds begin with empty caches; later ones find more and more of them."""
    lock = solve_environment(conda_yml("greeter", pip=("big",)), places).lock
    node, chance = Environments(tmp_path / "node", places.index), random.Random(7)
    seconds, finished = 4.0, 0
    for _ in range(KILLS):
        process = start_build(tmp_path / "node", wheels, lock)
        try:
            process.wait(timeout=chance.uniform(0.01, seconds))
            finished += 1
            seconds = max(0.1, seconds / 2)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if node.ready():
            assert node.verify(identity(lock), full=True) == []
            (node.path(identity(lock)) / "READY").unlink()  # the next build begins again, over what is there
    assert finished < KILLS / 2  # else it was not killed while at work
    made = node.materialize(lock)
    assert node.verify(made.fingerprint, full=True) == []
    subprocess.run([made.python, "-c", "import greeter, big.m99, torch"], check=True)
