"""Turns by order of the scheduler: park and go on, suspend, and what happens when an order meets the end of the job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scripted_child_names as does
from fakes_driver import JOB, World, make_world
from waiting import PATIENCE_S, until

from cluster.core.events import How
from cluster.core.job import JobState, Wish
from cluster.processes import running_attempts
from trainers.config import Hyperparams
from trainers.run.conversation import Conversation, Intent, Listeners, RunClock
from trainers.run.ports import Heartbeat
from trainers.run.records import RecordWriter
from trainers.run.turns import TurnActions, Turns

SCRIPT = Path(__file__).with_name("scripted_child.py")
S = JobState


class Running:
    """A driver whose child waits with its steps while the file `slow` is there."""

    def __init__(self, root: Path, seed: int = does.OBEYS, **changes: Any) -> None:
        grace = {"yield_grace_s": changes.pop("yield_grace_s", 20.0), "stop_grace_s": 20.0}
        self.made: World = make_world(root, SCRIPT, grace, hyperparams=Hyperparams(seed=seed), **changes)
        self.slow = root / "node" / "slow"
        self.slow.parent.mkdir(parents=True, exist_ok=True)
        self.slow.touch()
        self.thread = threading.Thread(target=self.made.driver.run)
        self.thread.start()
        until(lambda: self.store.state is S.RUNNING)

    @property
    def store(self) -> Any:
        return self.made.store

    def order(self, how: How | None) -> None:
        self.store.order = how
        self.made.driver.nudge()

    def park(self) -> None:
        self.order(How.PARK)
        until(lambda: self.store.state is S.PARKED)

    def resume(self) -> None:
        self.store.state = S.RUNNING
        self.made.driver.nudge()

    def end(self) -> None:
        self.slow.unlink(missing_ok=True)
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        until(lambda: (JOB, 1) not in running_attempts())


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Running]:
    return lambda *args, **changes: Running(tmp_path, *args, **changes)


def test_a_parked_job_goes_on_in_the_same_attempt(start: Callable[..., Running]) -> None:
    job = start()
    job.park()
    job.slow.unlink()
    time.sleep(0.2)  # nothing may happen: there is no condition to wait for
    assert (job.store.steps, job.store.freed) == ({}, 1)
    assert (JOB, 1) in running_attempts()
    job.resume()
    job.end()
    assert (job.store.state, sorted(job.store.steps)) == (S.SUCCEEDED, [1, 2, 3, 4, 5, 6])


def test_turns_can_change_many_times(start: Callable[..., Running]) -> None:
    job = start()
    for _ in range(5):
        job.park()
        job.resume()
    job.end()
    assert (job.store.state, job.store.freed) == (S.SUCCEEDED, 5)


def test_a_job_that_is_resumed_and_ordered_away_at_once_does_not_compute_without_slots(
    start: Callable[..., Running],
) -> None:
    job = start()
    job.park()
    job.store.state = S.RUNNING  # two changes before the driver looks
    job.park()
    job.slow.unlink()
    time.sleep(0.2)
    assert job.store.steps == {}
    job.resume()
    job.end()
    assert job.store.state is S.SUCCEEDED


def test_suspend_leaves_a_checkpoint_and_nothing_else(start: Callable[..., Running]) -> None:
    job = start()
    job.order(How.SUSPEND)
    job.thread.join(PATIENCE_S)
    assert (job.store.state, [kept.step for kept in job.store.checkpoints]) == (S.SUSPENDED, [0])
    job.end()
    assert job.store.moves[-1] == (S.SUSPENDED, "gave way to others")


def test_a_parked_job_can_be_suspended(start: Callable[..., Running]) -> None:
    job = start()
    job.park()
    job.order(How.SUSPEND)
    job.thread.join(PATIENCE_S)
    assert (job.store.state, len(job.store.checkpoints)) == (S.SUSPENDED, 1)
    job.end()


def test_a_child_that_cannot_park_is_suspended(start: Callable[..., Running]) -> None:
    job = start(kind="A100")
    job.order(How.PARK)
    job.thread.join(PATIENCE_S)
    assert (job.store.state, job.store.freed) == (S.SUSPENDED, 0)
    job.end()


def test_a_child_that_does_not_park_in_time_is_asked_to_stop(start: Callable[..., Running]) -> None:
    job = start(does.STUBBORN, yield_grace_s=0.3)
    job.order(How.PARK)
    job.thread.join(PATIENCE_S)
    assert (job.store.state, len(job.store.checkpoints)) == (S.SUSPENDED, 1)
    job.end()


def test_a_child_that_does_not_give_way_at_all_is_killed_and_goes_on_later(start: Callable[..., Running]) -> None:
    job = start(does.HANGS, yield_grace_s=0.2)
    job.order(How.PARK)
    job.thread.join(PATIENCE_S)
    assert (job.store.state, job.store.checkpoints) == (S.SUSPENDED, [])
    job.end()


def test_before_the_training_there_is_nothing_to_park(tmp_path: Path) -> None:
    made = make_world(tmp_path, SCRIPT, hyperparams=Hyperparams(seed=does.OBEYS))
    made.agent.hold.clear()
    made.store.order = How.PARK
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    thread.join(PATIENCE_S)
    assert (made.store.state, made.store.freed) == (S.SUSPENDED, 0)
    made.gang.fails = "ended"
    made.agent.hold.set()


@pytest.mark.parametrize(("wish", "then"), [(Wish.PAUSE, S.PAUSED), (Wish.CANCEL, S.CANCELLED)])
@pytest.mark.parametrize("parked", [True, False])
def test_what_the_tenant_wants_overtakes_an_order(
    start: Callable[..., Running], wish: Wish, then: JobState, parked: bool
) -> None:
    job = start()
    if parked:
        job.park()
    job.store.wish = wish
    job.order(How.SUSPEND)
    job.thread.join(PATIENCE_S)
    assert job.store.state is then
    job.end()


@pytest.mark.parametrize("how", list(How))
def test_an_order_that_meets_the_end_of_the_job_changes_nothing(start: Callable[..., Running], how: How) -> None:
    """The order comes at many moments of the last steps; however it falls, the job is done once or gives way whole."""
    job = start()
    job.slow.unlink()
    job.order(how)
    until(lambda: job.store.state in (S.SUCCEEDED, S.SUSPENDED, S.PARKED))
    if job.store.state is S.PARKED:
        job.resume()
    job.end()
    if job.store.state is S.SUSPENDED:
        assert sorted(job.store.steps) == list(range(1, len(job.store.steps) + 1))
    else:
        assert (job.store.state, sorted(job.store.steps)) == (S.SUCCEEDED, [1, 2, 3, 4, 5, 6])


def test_no_order_is_obeyed_while_the_database_is_away_and_all_afterwards(start: Callable[..., Running]) -> None:
    job = start()
    job.order(How.PARK)
    job.store.down = True
    time.sleep(0.3)
    assert job.store.freed == 0
    job.store.down = False
    until(lambda: job.store.state is S.PARKED)
    job.resume()
    job.end()
    assert job.store.state is S.SUCCEEDED


# Against a conversation alone ---------------------------------------------------------------------------------------


class Table:
    """The child's answers are given by the test."""

    def __init__(self) -> None:
        writer = RecordWriter(10, lambda: None, lambda error: None, lambda: None)
        self.talk = Conversation(("j", 1), None, writer, Listeners(print, lambda: None, print))  # type: ignore[arg-type]
        self.talk._at["ready"] = 0.0
        self.did: list[str] = []
        actions = TurnActions(lambda: self.did.append("suspend"), lambda: not self.did.append("free"))
        self.turns = Turns(self.talk, actions, grace_s=10.0)

    def beat(self, order: How | None = None, parked: bool = False, now: float = 0.0) -> list[str]:
        self.turns.follow(Heartbeat(Wish.RUN, False, order, parked), True, now)
        return [order["command"] for order in self.talk.relay([]) if order["order"] == "command"]

    def answer(self, state: str) -> None:
        command = {"id": self.talk._asked, "command": "park", "state": state}
        self.talk.relay([{"type": "ack", "at": 0.0, **command}])


def test_a_command_is_sent_once_and_a_late_answer_is_not_believed() -> None:
    table = Table()
    assert table.beat(How.PARK) == ["park"]
    assert table.beat(How.PARK) == []
    table.answer("parked")
    assert (table.beat(How.PARK), table.did) == ([], ["free"])
    assert table.beat() == ["resume"]
    assert table.beat(How.PARK) == ["park"]  # "parked" is what it was, not what it will be
    assert table.did == ["free"]
    table.answer("parked")
    table.beat(How.PARK)
    assert table.did == ["free", "free"]


def test_a_child_that_went_on_while_its_slots_were_taken_is_parked_again() -> None:
    table = Table()
    assert table.beat(parked=True) == ["park"]
    assert table.beat(parked=True, now=10.1) == []
    assert table.did == ["suspend"]


def test_an_order_that_was_taken_back_is_followed_by_a_resume() -> None:
    table = Table()
    assert table.beat(How.PARK) == ["park"]
    assert table.beat() == []
    table.answer("parked")
    assert table.beat() == ["resume"]
    table.answer("training")
    assert table.beat() == []


def test_seconds_parked_are_not_seconds_run() -> None:
    now = [0.0]
    clock = RunClock(lambda: now[0])
    assert not clock.started
    for then, act in ((0.0, clock.go), (5.0, clock.halt), (100.0, clock.go)):
        now[0] = then
        act()
    now[0] = 103.0
    assert (clock.seconds(), clock.started) == (8.0, True)


def test_a_wish_ranks_above_an_order() -> None:
    assert Intent.CANCEL.rank > Intent.PAUSE.rank == Intent.LIMIT.rank > Intent.SUSPEND.rank
