"""Checkpoints that come faster than the storage takes them: what a newer one takes the place of is not stored, and the child may let
go of it."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import IO

import pytest
import scripted_child_names as does
from fakes_driver import make_world
from waiting import PATIENCE_S, until

from cluster.storage.objects import ObjectStore
from trainers.config import Hyperparams
from trainers.run import worker
from trainers.run.child_process import spawn
from trainers.run.parts import Order, Record, WorkerTask
from trainers.run.preparing import prepare
from trainers.run.worker import Worker

SCRIPT = Path(__file__).with_name("scripted_child.py")
BEST, LAST_BEFORE_STOP, LAST = 2, 5, 6


class SlowStorage(ObjectStore):
    """Takes the first checkpoint when it is let, and fails as often as it shall before that."""

    def __init__(self, url: str, fails: bool = False) -> None:
        super().__init__(url)
        self.let = threading.Event()
        self.asked = threading.Event()
        self._fails = fails

    def put_stream(self, key: str, source: IO[bytes]) -> str:
        if "-s1/" in key:
            self.asked.set()
            assert self.let.wait(PATIENCE_S)
            if self._fails:
                raise OSError("the storage is down")
        return super().put_stream(key, source)


class Listener:
    """The driver of a worker: keeps what it says, tells it what it shall do."""

    def __init__(self, task: WorkerTask) -> None:
        self._task = task
        self.records: list[Record] = []
        self.orders: list[Order] = []

    def task(self) -> WorkerTask:
        return self._task

    def relay(self, records: list[Record]) -> list[Order]:
        self.records += records
        orders, self.orders = self.orders, []
        return orders

    @property
    def stored(self) -> list[int]:
        return [record["step"] for record in self.records if record["type"] == "stored"]

    def stop(self) -> None:
        self.orders.append({"order": "command", "id": 1, "command": "stop"})


class Stage:
    def __init__(self, root: Path, fails: bool = False) -> None:
        made = make_world(root, SCRIPT, hyperparams=Hyperparams(seed=does.HASTY))
        task = prepare(made.store.given, made.agent, made.driver._settings, lambda stage, seconds: None)["n1"]
        self.storage = SlowStorage(str(root / "objects"), fails)
        self.driver = Listener(task)
        self.worker = Worker(task, self.driver, self.storage, partial(spawn, command=(str(SCRIPT),)))
        self._thread = threading.Thread(target=self.worker.run, daemon=True)
        self._thread.start()
        assert self.storage.asked.wait(PATIENCE_S)

    def heard_of(self, step: int) -> bool:
        return self.worker._newest is not None and self.worker._newest["step"] == step

    def end(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.driver.records[-1]["type"] == "stopped"

    @property
    def let_go(self) -> list[int]:
        told = [line.split() for line in self.driver.records[-1]["log_tail"]]
        return [int(words[2]) for words in told if words[:2] == ["heard:", "dropped"]]


def test_the_newest_and_the_best_are_stored_and_what_lies_between_may_go(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    until(lambda: stage.heard_of(LAST_BEFORE_STOP))
    stage.storage.let.set()
    until(lambda: LAST_BEFORE_STOP in stage.driver.stored)
    assert stage.driver.stored == [1, BEST, LAST_BEFORE_STOP], "one that is under way is not given up"
    stage.driver.stop()
    stage.end()
    assert stage.driver.stored == [1, BEST, LAST_BEFORE_STOP, LAST] and stage.let_go == [3, 4]


def test_a_stop_leaves_all_the_time_to_the_last_checkpoint(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    until(lambda: stage.heard_of(LAST_BEFORE_STOP))
    stage.driver.stop()
    until(lambda: stage.heard_of(LAST))
    stage.storage.let.set()
    stage.end()
    assert stage.driver.stored == [BEST, LAST]
    assert not stage.storage.keys(stage.worker._task.prefix + f"/jobs/{stage.worker._task.job_id}/checkpoints/a1-s1/")


def test_one_that_storage_does_not_take_may_go(tmp_path: Path) -> None:
    stage = Stage(tmp_path, fails=True)
    until(lambda: stage.heard_of(LAST_BEFORE_STOP))
    stage.storage.let.set()
    until(lambda: LAST_BEFORE_STOP in stage.driver.stored)
    stage.driver.stop()
    stage.end()
    assert stage.driver.stored == [BEST, LAST_BEFORE_STOP, LAST] and stage.let_go == [1, 3, 4]
    warned = [record["message"] for record in stage.driver.records if record["type"] == "log"]
    assert any("the storage is down" in message and message.endswith("training goes on") for message in warned)


def test_a_long_upload_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_PROGRESS_S", 0.0)
    stage = Stage(tmp_path)
    stage.storage.let.set()
    until(lambda: LAST_BEFORE_STOP in stage.driver.stored)
    stage.driver.stop()
    stage.end()
    told = {record["what"] for record in stage.driver.records if record["type"] == "progress"}
    assert f"storing the checkpoint of step {LAST}, MiB" in told
