"""What a tenant's trainings keep on a node: its own, and bounded whatever they do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fakes_driver import make_world

from runtime_envs.sandbox.cgroup import Group
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Isolation
from trainers.run import confinement
from trainers.run.parts import WorkerTask
from trainers.run.preparing import prepare

UID = 31_779
needs_sandbox = pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}")


@pytest.fixture
def task(tmp_path: Path) -> WorkerTask:
    made = make_world(tmp_path, None, settings={"isolation": Isolation.PREFERRED}, uid=UID)
    return prepare(made.store.given, made.agent, made.driver._settings, lambda stage, seconds: None)["n1"]


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "MAX_CACHE_BYTES", 100_000)


def fill(task: WorkerTask, files: int) -> Path:
    cache = Path(task.config["cache_dir"])
    cache.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (cache / f"{number}.npz").write_bytes(b"tokens")
    return cache


def test_it_lies_beside_the_attempts_under_the_tenants_name(task: WorkerTask, tmp_path: Path) -> None:
    assert task.config["cache_dir"] == str(tmp_path / "node" / "caches" / "t1")


@needs_sandbox
def test_it_is_the_tenants_own_and_the_only_other_place_that_its_child_writes_to(task: WorkerTask) -> None:
    cache = fill(task, files=1)
    confined = confinement.confinement(task)
    assert confined.sandbox is not None
    assert confined.sandbox.writable == (Path(task.config["output_dir"]), cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert cache.stat().st_uid == (UID if os.geteuid() == 0 else os.geteuid())
    assert list(cache.iterdir()), "what is small stays"


def test_one_that_grew_too_large_is_thrown_away_and_no_job_of_its_tenant_fails_by_it(
    task: WorkerTask, full: Any
) -> None:
    share, output, cache = confinement.node_share(task), Path(task.config["output_dir"]), fill(task, files=1)
    assert share.exceeded(os.getpid(), output, Group()) is None and list(cache.iterdir())
    fill(task, files=3)
    assert share.exceeded(os.getpid(), output, Group()) is None
    assert not cache.exists()
    confinement.node_share(task)
    assert list(cache.iterdir()) == []
