"""A worker whose word does not reach its driver ends its child: nobody could stop that one any more."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest
import scripted_child_names as does
from fakes_driver import JOB, make_world
from waiting import PATIENCE_S, until

from cluster.core.job import JobState
from cluster.processes import running_attempts
from trainers.config import Hyperparams
from trainers.run.child_process import spawn
from trainers.run.parts import DriverGone, Order, Record, WorkerTask
from trainers.run.preparing import prepare
from trainers.run.worker import Worker

SCRIPT = Path(__file__).with_name("scripted_child.py")


class DeafDriver:
    """Takes the first words, and then fails."""

    def __init__(self, task: WorkerTask, error: Exception) -> None:
        self._task = task
        self._error = error

    def task(self) -> WorkerTask:
        return self._task

    def relay(self, records: list[Record]) -> list[Order]:
        if any(record["type"] == "ready" for record in records):
            raise self._error
        return []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [DriverGone("it left"), KeyError("a defect of the driver")])
def test_a_worker_that_is_not_heard_ends_its_child(tmp_path: Path, error: Exception) -> None:
    made = make_world(tmp_path, SCRIPT, hyperparams=Hyperparams(seed=does.HANGS))
    parts = made.driver._settings
    task = prepare(made.store.given, made.agent, parts, lambda stage, seconds: None)["n1"]
    worker = Worker(task, DeafDriver(task, error), made.storage, partial(spawn, command=(str(SCRIPT),)))
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    until(lambda: (JOB, 1) not in running_attempts())  # what the sandbox holds dies with it, a moment later
    assert made.store.state is JobState.PREPARING
