"""A worker and its child with isolation required: the conversation, the files and the end are those of a plain child."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import scripted_child_names as does
from fakes_driver import World, make_world
from waiting import PATIENCE_S, asked, lives, until

from cluster.processes import end_attempt, running_attempts
from runtime_envs.sandbox import watch
from runtime_envs.sandbox.cgroup import here
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Isolation
from trainers.config import Hyperparams
from trainers.run.child_process import spawn
from trainers.run.confinement import node_share
from trainers.run.parts import GIB, DriverGone, Order, Record, WorkerTask
from trainers.run.preparing import prepare
from trainers.run.worker import Worker

SCRIPT = (Path(__file__).parent / "scripted_child.py").read_text()
UID = 31_777
UID_OF_ONE = 31_000 + os.getpid() % 200
"""Of one test alone, which looks at all processes of its user: those of this file run side by side."""

needs_sandbox = pytest.mark.skipif(
    ability().mode is None, reason=f"no sandbox here: {ability().problem}; {ability().remedy}"
)
needs_groups = pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")


class Listener:
    """A driver that only listens."""

    def __init__(self) -> None:
        self.heard: list[Record] = []

    def task(self) -> WorkerTask:
        raise DriverGone("nobody asks")

    def relay(self, records: list[Record]) -> list[Order]:
        self.heard += records
        return []

    def of(self, kind: str) -> list[Record]:
        return [record for record in self.heard if record["type"] == kind]


def isolated(
    root: Path, does_what: int, isolation: Isolation = Isolation.REQUIRED, **changes: Any
) -> tuple[World, WorkerTask]:
    settings = {"isolation": isolation}
    made = make_world(root, None, settings=settings, hyperparams=Hyperparams(seed=does_what), **{"uid": UID, **changes})
    return made, prepare(made.store.given, made.agent, made.driver._settings, lambda stage, seconds: None)["n1"]


def work(made: World, task: WorkerTask, driver: Listener) -> threading.Thread:
    worker = Worker(task, driver, made.storage, partial(spawn, command=("-c", SCRIPT)))
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    return thread


@needs_sandbox
def test_it_trains_to_the_end_and_its_files_are_taken_over(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.GOOD)
    driver = Listener()
    work(made, task, driver).join(PATIENCE_S)
    assert [record["step"] for record in driver.of("step")] == list(range(1, 7)), driver.heard
    artifact = driver.of("artifact")[0]
    assert made.storage.read_bytes(f"{artifact['prefix']}/adapter_model.safetensors") == b"adapter"
    written = Path(task.config["output_dir"]) / "artifact"
    assert written.stat().st_uid == (UID if os.geteuid() == 0 else os.geteuid())
    assert driver.of("hello")[0]["pid"] < 10, "in a process namespace of its own"


@needs_sandbox
def test_a_signal_inside_is_a_signal_outside(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.DIES)
    driver = Listener()
    work(made, task, driver).join(PATIENCE_S)
    assert driver.of("lost")[0]["signal"] == 9


@needs_sandbox
def test_an_agent_finds_it_and_ends_all_of_it(tmp_path: Path) -> None:
    job = f"ftjob-sealed{os.getpid()}"
    made, task = isolated(tmp_path, does.HANGS, job_id=job, uid=UID_OF_ONE)
    driver = Listener()
    thread = work(made, task, driver)
    until(lambda: bool(driver.of("ready")))
    assert (job, 1) in running_attempts()
    assert end_attempt(job, 1)
    thread.join(PATIENCE_S)
    assert driver.of("lost")[0]["signal"] == 9
    assert not [process for process in psutil.process_iter() if _uid(process) == UID_OF_ONE]


def _uid(process: psutil.Process) -> int | None:
    uids = asked(process.uids, None)
    return uids.real if uids and lives(process) else None


@needs_sandbox
@needs_groups
@pytest.mark.parametrize("hog", [does.HOG, does.HOGS])
def test_more_memory_than_its_part_has_a_name_however_fast_it_was(
    tmp_path: Path, hog: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
    made, task = isolated(tmp_path, hog)
    driver = Listener()
    work(made, replace(task, memory_gb=0.3), driver).join(PATIENCE_S)
    end = driver.heard[-1]
    assert (end["type"], end["code"]) == ("failed", "memory_limit_exceeded"), end
    assert end["message"] == "the training wanted more than its part, 0.3 GiB of the node's memory" and end["hint"]
    assert not groups_of(task)


@needs_sandbox
@needs_groups
def test_a_death_within_its_part_keeps_its_name(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.FAILS)
    driver = Listener()
    work(made, task, driver).join(PATIENCE_S)
    assert driver.heard[-1]["code"] == "loss_not_finite" and not groups_of(task)


def groups_of(task: WorkerTask) -> list[Path]:
    place = here()
    assert place is not None
    return [group for parent in place.parents for group in Path(parent).glob(f"heliostat/{task.job_id}-*")]


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="tenants have users of their own where the platform is root")
def test_a_tenant_without_a_user_of_its_own_is_refused_in_words(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.GOOD)
    driver = Listener()
    work(made, replace(task, uid=None), driver).join(PATIENCE_S)
    assert [(one["type"], one["code"], one["fixable_by"]) for one in driver.heard] == [
        ("failed", "no_tenant_uid", "operator")
    ]


@pytest.mark.usefixtures("bare_host")
def test_where_the_host_cannot_isolate_a_job_runs_and_says_so(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.GOOD, Isolation.PREFERRED)
    driver = Listener()
    work(made, task, driver).join(PATIENCE_S)
    assert [record["message"] for record in driver.of("log")] == [
        "this training is not isolated: bubblewrap, util-linux not installed on its node"
    ]
    assert len(driver.of("artifact")) == 1


@pytest.mark.usefixtures("bare_host")
def test_or_does_not_run_where_isolation_is_required(tmp_path: Path) -> None:
    made, task = isolated(tmp_path, does.GOOD)
    driver = Listener()
    work(made, task, driver).join(PATIENCE_S)
    assert [(one["type"], one["code"], one["fixable_by"]) for one in driver.heard] == [
        ("failed", "isolation_unavailable", "operator")
    ]
    assert "apt install bubblewrap" in driver.heard[0]["hint"]


def test_the_memory_of_a_child_is_that_of_its_slots(tmp_path: Path) -> None:
    _, plain = isolated(tmp_path, does.GOOD)
    assert node_share(plain).memory_bytes == 4 * GIB, "the node's, for one slot"
    _, asked = isolated(tmp_path, does.GOOD, memory_limit_gb=1.5)
    assert node_share(asked).memory_bytes == int(3.5 * GIB), "and what the imports take"
