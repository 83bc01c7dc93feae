"""An attempt of method `custom` from its assignment to its version: the tenant's code staged, run (in a sandbox too), cut,
resumed, failed."""

from __future__ import annotations

import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_custom import STEPS
from fakes_driver import World, make_world
from waiting import PATIENCE_S, until

from cluster.core.events import How
from cluster.core.job import JobState
from cluster.storage.objects import folder_sha256
from runtime_envs.sandbox.cgroup import here
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Isolation
from trainers.run import child_process, confinement
from trainers.run.ports import LastCheckpoint, Script

pytestmark = pytest.mark.integration
S = JobState
UID = 31_778
CODE = "tenants/t1/code/c"


def custom_world(root: Path, text: str = STEPS, isolation: Isolation = Isolation.OFF, **changes: Any) -> World:
    """A job whose script was uploaded; `params` go to it."""
    params = {"steps": 5, **changes.pop("params", {})}
    settings = {"isolation": isolation, "yield_grace_s": 20.0, "stop_grace_s": 20.0, "checkpoint_every_s": 1e9}
    made = make_world(root, None, settings, method="custom", uid=UID, **changes)
    sha256 = made.storage.put_bytes(f"{CODE}/train.py", textwrap.dedent(text).encode())
    made.store.given = replace(made.store.given, script=Script(["train.py"], params, CODE, {"train.py": sha256}))
    return made


def run(made: World) -> None:
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("isolation", [Isolation.OFF, Isolation.REQUIRED])
def test_a_script_makes_a_version(tmp_path: Path, isolation: Isolation) -> None:
    if isolation is Isolation.REQUIRED and ability().mode is None:
        pytest.skip(f"no sandbox here: {ability().problem}")
    made = custom_world(tmp_path, isolation=isolation)
    run(made)
    assert made.store.state is S.SUCCEEDED, made.store.error
    assert [made.store.steps[step].loss for step in range(1, 6)] == [1.0 / step for step in range(1, 6)]
    result = made.store.result
    assert result is not None and list(result["files"]) == ["made-by-0"]
    assert made.storage.read_bytes(f"{result['prefix']}/made-by-0") == b"5"
    assert result["metrics"] == {"accuracy": 0.5, "train_loss": 0.2}
    code = made.store.given.script
    assert code is not None and result["lineage"]["code_sha256"] == folder_sha256(code.files)
    assert result["lineage"]["entrypoint"] == ["train.py"] and result["lineage"]["params"] == {"steps": 5}


def test_the_code_cannot_be_written_by_the_script(tmp_path: Path) -> None:
    if ability().mode is None:
        pytest.skip(f"no sandbox here: {ability().problem}")
    made = custom_world(tmp_path, "open('train.py', 'a')", Isolation.REQUIRED)
    run(made)
    assert made.store.state is S.FAILED and made.store.error is not None
    assert made.store.error["code"] == "script_failed" and "PermissionError" in str(made.store.error["message"])
    assert made.store.error["fixable_by"] == "user"


@pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")
def test_a_script_that_takes_a_gib_at_once_fails_by_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ability().mode is None:
        pytest.skip(f"no sandbox here: {ability().problem}")
    for module in (confinement, child_process):
        monkeypatch.setattr(module, "memory_share", lambda task: 300 << 20)
    made = custom_world(tmp_path, "b'x' * (1 << 30)", Isolation.REQUIRED)
    run(made)
    assert made.store.state is S.FAILED and made.store.error is not None
    assert made.store.error["code"] == "memory_limit_exceeded", made.store.error


def test_parked_suspended_and_on_in_another_attempt(tmp_path: Path) -> None:
    made = custom_world(tmp_path / "one", params={"steps": 100_000, "seconds": 0.01})
    store = made.store
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    until(lambda: bool(store.steps))
    store.order = How.PARK
    made.driver.nudge()
    until(lambda: store.state is S.PARKED)
    stood = max(store.steps)
    store.order = How.SUSPEND
    made.driver.nudge()
    thread.join(PATIENCE_S)
    assert store.state is S.SUSPENDED
    last = store.checkpoints[-1]
    assert stood <= last.step == max(store.steps)
    again = custom_world(tmp_path / "two", params={"steps": last.step + 3})
    resumed(again, made, last)
    run(again)
    assert again.store.state is S.SUCCEEDED, again.store.error
    assert sorted(again.store.steps) == [last.step + 1, last.step + 2, last.step + 3]


def resumed(again: World, made: World, last: LastCheckpoint) -> None:
    """The storage of the one is that of the other."""
    for name in last.files:
        again.storage.put_bytes(f"{last.prefix}/{name}", made.storage.read_bytes(f"{last.prefix}/{name}"))
    again.store.given = replace(again.store.given, checkpoint=last)
