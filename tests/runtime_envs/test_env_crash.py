"""SIGKILL at any point of a build: the next one finishes the work, and nothing half-made is ever handed out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders_wheels import environment_yml

from runtime_envs.fingerprint import fingerprint_of
from runtime_envs.index import PipIndex
from runtime_envs.lock import solve
from runtime_envs.materialize import HostEnvironments
from runtime_envs.verify import full_verify

BUILD = """
import json, sys
from pathlib import Path
from runtime_envs.index import PipIndex
from runtime_envs.materialize import HostEnvironments
root, wheels, lock = sys.argv[1:]
print("go", flush=True)
HostEnvironments(Path(root), PipIndex(find_links=(wheels,), offline=True)).materialize(json.loads(lock))
"""
PATIENCE_S = 60.0

pytestmark = pytest.mark.integration


def wait_for(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


def start_build(root: Path, wheels: Path, lock: dict[str, Any]) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", BUILD, str(root), str(wheels), json.dumps(lock)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


MOMENTS = {
    "at once": "locks",
    "a bare prefix": "envs/{}/prefix/pyvenv.cfg",
    "the first package": "envs/{}/prefix/lib/*/site-packages/big",
    "byte code": "envs/{}/prefix/lib/*/site-packages/big/__pycache__",
    "before the manifest": "envs/{}/lock.json",
    "before READY": "envs/{}/manifest.json.gz",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment: str, tmp_path: Path, wheels: Path, index: PipIndex) -> None:
    lock = solve(environment_yml("big", "greeter"), index=index).lock
    fingerprint, root = fingerprint_of(lock), tmp_path / "node"
    process = start_build(root, wheels, lock)
    wait_for(lambda: list(root.glob(MOMENTS[moment].format(fingerprint))) or process.poll() is not None)
    kill(process)
    environments = HostEnvironments(root, index)
    if environments.ready():  # it was quicker than the signal
        assert full_verify(environments.path(fingerprint)) == []
    prepared = environments.materialize(lock)
    assert full_verify(environments.path(fingerprint)) == []
    subprocess.run([prepared.python, "-c", "import greeter, big.m99"], check=True)


def test_killed_again_and_again(tmp_path: Path, wheels: Path, index: PipIndex) -> None:
    lock = solve(environment_yml("big"), index=index).lock
    environments = HostEnvironments(tmp_path / "node", index)
    for milliseconds in (20, 80, 200):
        process = start_build(tmp_path / "node", wheels, lock)
        time.sleep(milliseconds / 1000)  # not to wait for something: to die at another point each time
        kill(process)
    prepared = environments.materialize(lock)
    assert full_verify(environments.path(prepared.fingerprint)) == []
