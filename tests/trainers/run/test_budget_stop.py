"""A driver whose job has used its budget: a checkpoint, then the end, and the reason."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import scripted_child_names as does
from fakes_driver import World, make_world
from waiting import PATIENCE_S

from cluster.core.job import JobState
from trainers.config import Hyperparams
from trainers.run.ports import Allowance

SCRIPT = Path(__file__).with_name("scripted_child.py")


def run(made: World) -> None:
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


@pytest.mark.parametrize("code", ["budget_reached", "quota_exceeded"])
def test_it_is_paused_at_a_checkpoint_and_says_why(tmp_path: Path, code: str) -> None:
    made = make_world(tmp_path, SCRIPT, hyperparams=Hyperparams(seed=does.SLOW))
    made.store.allowed = Allowance(0.0, code, "2 GPU-hours")
    run(made)
    assert made.store.state is JobState.PAUSED
    assert made.store.error is not None and made.store.error["code"] == code
    assert made.store.moves[-1][1].startswith(f"{code}: 2 GPU-hours")
    assert len(made.store.checkpoints) == 1


def test_with_enough_left_it_ends_by_itself(tmp_path: Path) -> None:
    made = make_world(tmp_path, SCRIPT, hyperparams=Hyperparams(seed=does.GOOD))
    made.store.allowed = Allowance(600.0, "budget_reached", "2 GPU-hours")
    run(made)
    assert made.store.state is JobState.SUCCEEDED
