from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import psutil
import pytest
from waiting import lives, until

from cluster import processes
from cluster.processes import MARK_VARIABLE, end_attempt, running_attempts
from trainers import protocol

Spawn = Callable[..., subprocess.Popen[str]]

JOB = f"ftjob-x{os.getpid()}"
"""Nobody else's on this machine: of another suite that runs beside this one neither."""

SLEEP = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEP
TREE = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'], env={}); print(p.pid, flush=True); p.wait()"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    spawned: list[subprocess.Popen[str]] = []

    def start(mark: str, code: str = SLEEP) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, MARK_VARIABLE: mark},
            start_new_session=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        spawned.append(process)
        return process

    yield start
    for process in spawned:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_mark_is_the_one_that_children_carry() -> None:
    assert MARK_VARIABLE == protocol.MARK_VARIABLE


def test_attempts_are_found_by_their_mark(spawn: Spawn) -> None:
    spawn(f"{JOB}-1/3")
    spawn("not an attempt")
    until(lambda: (f"{JOB}-1", 3) in running_attempts())
    assert not [attempt for attempt in running_attempts() if "not" in attempt[0]]


def test_an_attempt_is_ended_whole_and_no_other(spawn: Spawn) -> None:
    one, other = spawn(f"{JOB}-2/1", STUBBORN), spawn(f"{JOB}-2/2")
    assert (_said(one), _said(other)) == ("up", "up")
    assert end_attempt(f"{JOB}-2", 1)
    assert one.wait(60) == -9
    assert other.poll() is None


def test_processes_that_lost_the_mark_are_found_by_their_session(spawn: Spawn) -> None:
    leader = spawn(f"{JOB}-3/1", TREE)
    grandchild = int(_said(leader))
    process = psutil.Process(grandchild)
    assert end_attempt(f"{JOB}-3", 1)
    assert not lives(process)


def test_nothing_to_end_is_an_end() -> None:
    assert end_attempt("ftjob-never", 1)


def test_an_attempt_that_outlives_the_time_is_not_called_dead(spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    process = spawn(f"{JOB}-4/1")
    assert _said(process) == "up"
    monkeypatch.setattr(processes._Traces, "kill", lambda traces, pid: None)  # as in uninterruptible sleep
    assert not end_attempt(f"{JOB}-4", 1, timeout_s=0.1)
    assert process.poll() is None


def test_a_process_that_shows_no_environment_for_a_moment_is_ended_too(
    spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while it starts a program: a launcher does that several times on its way."""
    process = spawn(f"{JOB}-5/1")
    assert _said(process) == "up"
    shown, blank = processes._environment, iter([b""] * 10)
    monkeypatch.setattr(
        processes, "_environment", lambda pid: next(blank, shown(pid)) if pid == process.pid else shown(pid)
    )
    assert end_attempt(f"{JOB}-5", 1)
    assert process.wait(60) == -9
