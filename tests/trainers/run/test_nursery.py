"""Children that are started before their workers: handed over whole, and gone with whoever holds them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import scripted_child_names as does
from fakes_driver import World, make_world
from waiting import PATIENCE_S, asked, until

from cluster.core.job import JobState
from cluster.errors import JobFailure
from cluster.processes import end_attempt, running_attempts
from runtime_envs.sandbox import watch
from runtime_envs.sandbox.cgroup import here
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Isolation
from trainers.config import Hyperparams
from trainers.run import child_process, confinement, early, nursery
from trainers.run.child_process import Child, KeptProcess, adopt, adopt_or_spawn, spawn
from trainers.run.early import may_change_priority
from trainers.run.keeper import NICE
from trainers.run.nursery import Coming, Nursery
from trainers.run.parts import WorkerTask
from trainers.run.preparing import parts_of, prepare, stage

SCRIPT = Path(__file__).with_name("scripted_child.py")
JOB = f"ftjob-early{os.getpid()}"
ROOT = Path(__file__).parents[3]
AGENT = """
import pickle, sys, time
from trainers.run.early import may_change_priority
from trainers.run.keeper import NICE
from trainers.run.nursery import Coming, Nursery
print(Nursery((sys.argv[1],)).start(pickle.loads(sys.stdin.buffer.read())), flush=True)
time.sleep(600)
"""

needs_sandbox = pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    until(lambda: (JOB, 1) not in running_attempts())


def world(root: Path, seed: int = does.GOOD, **changes: Any) -> World:
    """Its agent starts the child, its worker must find it."""
    made = make_world(root, SCRIPT, job_id=JOB, hyperparams=Hyperparams(seed=seed), **changes)
    made.agent.children = Nursery((str(SCRIPT),))
    made.gang._spawn = taken_over
    return made


def taken_over(task: WorkerTask) -> Child:
    assert task.keeper is not None
    return adopt(Path(task.keeper))


def early_children() -> list[psutil.Process]:
    """Of keepers whose agent is this process."""
    keepers = [one for one in psutil.Process().children() if "trainers.run.keeper" in asked(one.cmdline, [])]
    return [child for keeper in keepers for child in asked(keeper.children, [])]


def prepared(made: World) -> WorkerTask:
    return prepare(made.store.given, made.agent, made.driver._settings, lambda stage, seconds: None)["n1"]


def run(made: World) -> World:
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    return made


@contextmanager
def agent_of_its_own(task: WorkerTask) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """In a process; it has started the child, in this folder."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(SCRIPT)],
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert agent.stdin is not None and agent.stdout is not None
    with agent:
        agent.stdin.write(pickle.dumps(task))
        agent.stdin.close()
        yield agent, agent.stdout.readline().decode().strip()
        agent.kill()


def test_the_worker_takes_the_conversation_over_from_its_first_word_on(tmp_path: Path) -> None:
    store = run(world(tmp_path)).store
    assert store.state is JobState.SUCCEEDED, store.moves
    assert [state for state, _ in store.moves] == [JobState.RUNNING, JobState.ARCHIVING]
    assert list(store.steps) == [1, 2, 3, 4, 5, 6]
    assert store.checkpoints[-1].step == 6
    assert store.stages()[-1] == "archiving"


@needs_sandbox
@pytest.mark.integration
def test_so_it_is_in_a_sandbox(tmp_path: Path) -> None:
    made = world(tmp_path, settings={"isolation": Isolation.REQUIRED}, uid=31_778)
    made.agent.children = Nursery(("-c", SCRIPT.read_text()))
    assert run(made).store.state is JobState.SUCCEEDED, made.store.moves


@needs_sandbox
@pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")
@pytest.mark.parametrize("hog", [does.HOG, does.HOGS])
def test_and_a_hog_is_named_though_its_parent_is_a_keeper(
    tmp_path: Path, hog: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confinement, "memory_share", lambda task: 300 << 20)
    monkeypatch.setattr(child_process, "memory_share", lambda task: 300 << 20)
    monkeypatch.setattr(watch, "LOOK_S", 0.05)
    made = world(tmp_path, hog, settings={"isolation": Isolation.REQUIRED}, uid=31_778)
    made.agent.children = Nursery(("-c", SCRIPT.read_text()))
    store = run(made).store
    assert store.error is not None and store.error["code"] == "memory_limit_exceeded", store.error
    until(lambda: not groups())


@needs_sandbox
@pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")
def test_the_group_of_a_keeper_that_was_killed_is_swept(tmp_path: Path) -> None:
    made = world(tmp_path, does.HANGS, settings={"isolation": Isolation.REQUIRED}, uid=31_778)
    made.agent.children = Nursery(("-c", SCRIPT.read_text()))
    prepared(made)
    assert groups()
    end_attempt(JOB, 1)
    until(lambda: not groups())


def groups() -> list[Path]:
    plan = here()
    assert plan is not None
    return [group for parent in plan.parents for group in Path(parent).glob(f"heliostat/{JOB}-*")]


def test_who_was_granted_at_once_never_waits_at_a_low_priority(tmp_path: Path) -> None:
    adopted = taken_over(prepared(world(tmp_path)))
    child, usual = psutil.Process(adopted.process.pid), os.getpriority(os.PRIO_PROCESS, 0)
    assert {one.nice() for one in (child, *child.children(recursive=True))} == {usual}
    adopted.channel.close()
    os.close(adopted.logs)
    adopted.end(0.0)


def test_a_call_that_is_repeated_starts_nothing(tmp_path: Path) -> None:
    made = world(tmp_path, does.HANGS)
    task = prepared(made)
    assert made.agent.start_child(task) == task.keeper
    assert len(early_children()) == 1
    end_attempt(JOB, 1)
    again = made.agent.start_child(task)
    assert again not in (None, task.keeper), "a dead one is replaced"
    end_attempt(JOB, 1)


def test_one_that_cannot_import_is_told_of_with_its_last_words(tmp_path: Path) -> None:
    store = run(world(tmp_path, does.MUTE)).store
    assert store.state is JobState.FAILED
    assert store.error is not None and store.error["code"] == "child_failed_to_start"
    assert "cannot import torch" in str(store.error["message"])


def test_one_that_takes_too_much_before_its_worker_is_there_fails_by_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = world(tmp_path, does.HANGS)
    hog = JobFailure("it took too much", code="memory_limit_exceeded", hint="ask for less")
    monkeypatch.setattr(confinement.NodeShare, "exceeded", lambda share, pid, output, group: hog)
    monkeypatch.setattr(watch, "LOOK_S", 0.02)

    def later(task: WorkerTask) -> Child:
        until(lambda: [asked(child.status, "gone") for child in early_children()] == [psutil.STATUS_ZOMBIE])
        return taken_over(task)

    made.gang._spawn = later
    store = run(made).store
    assert store.error is not None and store.error["code"] == "memory_limit_exceeded"


@pytest.mark.parametrize("seed", [does.GOOD, does.HANGS])
def test_it_ends_with_its_worker(tmp_path: Path, seed: int) -> None:
    child = taken_over(prepared(world(tmp_path, seed)))
    os.close(child.logs)
    child.channel.close()
    assert isinstance(child.process, KeptProcess)
    child.process.leave()
    until(lambda: not psutil.pid_exists(child.process.pid))


@pytest.mark.integration
def test_a_killed_agent_leaves_nothing_and_the_worker_starts_another(tmp_path: Path) -> None:
    task = prepared(make_world(tmp_path, None, job_id=JOB, hyperparams=Hyperparams(seed=does.HANGS)))
    with agent_of_its_own(task) as (agent, keeper):
        until(lambda: (JOB, 1) in running_attempts())
        agent.kill()
        until(lambda: (JOB, 1) not in running_attempts())
    child = adopt_or_spawn(replace(task, keeper=keeper))
    assert not child.started
    os.close(child.logs)
    child.channel.close()
    child.end(0.0)


@pytest.mark.integration
def test_a_killed_agent_takes_no_training_along_that_has_a_worker(tmp_path: Path) -> None:
    task = prepared(make_world(tmp_path, None, job_id=JOB))
    with agent_of_its_own(task) as (agent, keeper):
        child = adopt(Path(keeper))
        agent.kill()
        agent.wait()
        heard = [child.channel.receive(60)["type"]]  # type: ignore[index]
        while heard[-1] != "finished":
            heard.append(child.channel.receive(60)["type"])  # type: ignore[index]
    assert heard.count("step") == 6
    child.channel.close()
    os.close(child.logs)
    assert child.end(60.0) == 0


# Jobs that may come ------------------------------------------------------------------------------------------------


class Ahead:
    """A nursery that was told of a job whose first attempt may come."""

    def __init__(self, made: World, kind: str = "cpu") -> None:
        self.made = made
        self.nursery = made.agent.children = Nursery((str(SCRIPT),))
        self.assignment = replace(made.store.given, kind=kind)
        assert self.nursery.expect([(JOB, 1)]) == [(JOB, 1)]
        self.nursery.prepare(Coming(self.assignment, made.driver._settings), made.agent)

    def wait_for_child(self) -> psutil.Process:
        until(lambda: [asked(child.status, "gone") for child in early_children()] == [psutil.STATUS_SLEEPING])
        return early_children()[0]


def test_what_may_come_waits_at_low_priority_and_goes_on_at_the_grant(tmp_path: Path) -> None:
    ahead = Ahead(world(tmp_path))
    child = ahead.wait_for_child()
    assert ahead.nursery.waiting() == {(JOB, 1)}
    assert ahead.nursery.expect([(JOB, 1)]) == []
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert child.nice() == (max(NICE, usual) if may_change_priority() else usual)
    task = prepared(ahead.made)
    adopted = taken_over(task)
    assert adopted.process.pid == child.pid, "the same one"
    assert adopted.channel.receive(60)["type"] == "hello"  # type: ignore[index]
    assert child.nice() == usual
    assert (ahead.nursery.waiting(), ahead.nursery.expect([(JOB, 1)])) == (frozenset(), []), "it is not asked for again"
    adopted.channel.close()
    os.close(adopted.logs)
    adopted.end(0.0)


def test_what_does_not_come_is_let_go_with_its_files(tmp_path: Path) -> None:
    ahead = Ahead(world(tmp_path))
    child = ahead.wait_for_child()
    assert ahead.nursery.expect([]) == []
    until(lambda: not psutil.pid_exists(child.pid))
    until(lambda: ahead.made.agent.cleared == [(JOB, 1)])
    until(lambda: ahead.nursery.waiting() == frozenset())


def test_what_is_let_go_is_no_stray_while_it_lives(tmp_path: Path) -> None:
    """Its keeper is held up: the process lives on, and nobody was granted it."""
    ahead = Ahead(world(tmp_path))
    child = ahead.wait_for_child()
    keeper = psutil.Process(child.ppid())
    keeper.suspend()
    try:
        ahead.nursery.expect([])
        assert (JOB, 1) in running_attempts() and (JOB, 1) in ahead.nursery.waiting()
    finally:
        keeper.resume()
    until(lambda: (JOB, 1) not in running_attempts())
    until(lambda: ahead.nursery.waiting() == frozenset())


def test_what_was_granted_after_it_was_let_go_keeps_its_files(tmp_path: Path) -> None:
    ahead = Ahead(world(tmp_path))
    ahead.wait_for_child()
    slow = threading.Event()
    ahead.nursery._background.submit(slow.wait, PATIENCE_S)  # another job's environment
    ahead.nursery.expect([])
    task = prepared(ahead.made)
    ahead.nursery.expect([])
    slow.set()
    ahead.nursery._background.submit(lambda: None).result(PATIENCE_S)
    assert Path(task.scratch, "data", "train.jsonl").is_file()
    assert ahead.nursery.waiting() == frozenset()
    assert end_attempt(JOB, 1)


def test_what_is_named_late_or_again_changes_nothing(tmp_path: Path) -> None:
    ahead = Ahead(made := world(tmp_path))
    child = ahead.wait_for_child()
    coming = Coming(ahead.assignment, made.driver._settings)
    ahead.nursery.prepare(coming, made.agent)
    ahead.nursery._background.submit(lambda: None).result(PATIENCE_S)
    assert early_children() == [child]
    ahead.nursery.expect([])
    ahead.nursery.prepare(coming, made.agent)
    until(lambda: not psutil.pid_exists(child.pid))
    until(lambda: ahead.nursery.waiting() == frozenset())


@pytest.mark.parametrize(("limit", "value"), [("CHILD_GB", 0.0), ("WAITING_S", -1)])
def test_one_that_takes_more_than_imports_do_is_ended_and_a_new_one_is_started_by_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    monkeypatch.setattr(early, limit, value)
    monkeypatch.setattr(watch, "LOOK_S", 0.02)
    ahead = Ahead(made := world(tmp_path))
    until(lambda: ahead.nursery._ahead[JOB, 1].early is not None)
    ahead.nursery.expect([(JOB, 1)])
    until(lambda: (JOB, 1) not in running_attempts())
    made.gang._spawn = partial(spawn, command=(str(SCRIPT),))
    assert run(made).store.state is JobState.SUCCEEDED, made.store.moves


def test_where_the_grant_names_the_devices_only_files_are_made_ready(tmp_path: Path) -> None:
    ahead = Ahead(made := world(tmp_path), kind="A100")
    until(lambda: bool(list((tmp_path / "node").glob(f"jobs/{JOB}/a1/data/train.jsonl"))))
    ahead.nursery._background.shutdown()
    assert made.agent.report().node.models and (JOB, 1) not in running_attempts()


def test_without_room_for_parked_jobs_there_is_none_for_what_may_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "CHILD_GB", 5.0)
    ahead = Ahead(world(tmp_path))
    ahead.nursery._background.shutdown()
    assert (JOB, 1) not in running_attempts()


def test_one_that_was_made_of_something_else_is_replaced(tmp_path: Path) -> None:
    ahead = Ahead(world(tmp_path))
    child = ahead.wait_for_child()
    given = ahead.made.store.given
    task = stage(given, parts_of(given)[0], ahead.made.agent, ahead.made.driver._settings, lambda stage, seconds: None)
    task = replace(task, threads=7)
    adopted = taken_over(replace(task, keeper=ahead.nursery.start(task)))
    assert adopted.process.pid != child.pid
    until(lambda: not psutil.pid_exists(child.pid))
    adopted.channel.close()
    os.close(adopted.logs)
    adopted.end(0.0)


def test_who_ends_an_attempt_ends_its_keeper_too(tmp_path: Path) -> None:
    task = prepared(world(tmp_path, does.HANGS))
    assert end_attempt(JOB, 1)
    with pytest.raises(OSError):
        adopt(Path(str(task.keeper)))


def test_a_keeper_that_is_killed_costs_only_the_exit_code(tmp_path: Path) -> None:
    child = taken_over(prepared(world(tmp_path)))
    psutil.Process(child.process.pid).parent().kill()  # type: ignore[union-attr]
    child.channel.close()
    os.close(child.logs)
    assert child.end(60.0) == -signal.SIGKILL
