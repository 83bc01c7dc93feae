"""One supervisor a data folder; what it writes is private and whole; what it started ends with it, also on a full disk."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from waiting import until

from app import ray_head, supervisor
from app.cli.local_service import end_left_behind, read_state
from app.processes import PORTS, end_marked, free_port, in_sessions, mark, marked, start
from app.settings import Settings
from app.supervisor import Supervisor, check_isolation, resolve, resolved_file, state_file, write_resolved
from cluster.errors import Conflict, Unavailable

SLEEPER = [sys.executable, "-c", "import time; time.sleep(300)"]
PARENT = [
    sys.executable,
    "-c",
    "import subprocess, sys, time; "
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=True); time.sleep(300)",
]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def instance() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    end_marked(name)


def environment(instance: str) -> dict[str, str]:
    return {**os.environ, **mark(instance)}


def listening(port: int) -> subprocess.Popen[str]:
    code = (
        f"import socket; s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen(); print(1, flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_taken_port_is_refused_with_the_name_of_its_holder(settings: Settings) -> None:
    port = free_port()
    with listening(port) as holder:
        taken = settings.model_copy(update={"http": settings.http.model_copy(update={"port": port})})
        with pytest.raises(Conflict) as caught:
            resolve(taken)
        assert caught.value.code == "port_taken" and caught.value.hint
        assert f"process {holder.pid}" in caught.value.message
        holder.communicate("")


def test_ports_that_nobody_named_become_free_ones(settings: Settings) -> None:
    found = resolve(settings.model_copy(update={"http": settings.http.model_copy(update={"port": 0})}))
    ports = {found.http.port, found.ray.port, found.ray.dashboard_port}
    assert len(ports) == 3 and all(port in PORTS for port in ports)


def test_what_is_written_for_the_processes_is_private(settings: Settings) -> None:
    settings.run_dir.mkdir(parents=True)
    write_resolved(settings)
    assert stat.S_IMODE(resolved_file(settings.data_dir).stat().st_mode) == 0o600
    assert json.loads(resolved_file(settings.data_dir).read_text())["data_dir"] == str(settings.data_dir)


def test_a_second_supervisor_touches_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    first = Supervisor(settings)
    first._claim_data_dir()
    first._say(phase="ready")
    before = state_file(settings.data_dir).read_text()
    assert Supervisor(settings).run() == 1
    assert "another Heliostat runs on" in caplog.text
    assert state_file(settings.data_dir).read_text() == before


def test_what_a_killed_supervisor_left_is_ended_by_the_next(settings: Settings, instance: str, tmp_path: Path) -> None:
    killed = Supervisor(settings)
    killed.state.instance = instance
    settings.run_dir.mkdir(parents=True)
    killed._say()
    left = start("left", PARENT, environment(instance), tmp_path / "log")
    until(lambda: list(marked(instance)))  # /proc shows it a moment after the start
    Supervisor(settings)._claim_data_dir()
    assert not left.alive
    assert list(marked(instance)) == []


def test_the_command_ends_what_a_killed_supervisor_left(settings: Settings, instance: str, tmp_path: Path) -> None:
    killed = Supervisor(settings)
    killed.state.instance, killed.state.ready = instance, True
    settings.run_dir.mkdir(parents=True)
    scratch = tmp_path / "ray"
    scratch.mkdir()
    killed.state.scratch = str(scratch)
    killed._say()
    left = start("left", SLEEPER, environment(instance), tmp_path / "log")
    until(lambda: list(marked(instance)))
    with FileLock(settings.run_dir / "lock", is_singleton=False):  # the supervisor lives, whatever its state file says
        assert not end_left_behind(settings.data_dir, read_state(settings.data_dir))
        assert left.alive
    assert end_left_behind(settings.data_dir, read_state(settings.data_dir))
    assert not left.alive
    assert not scratch.exists()
    assert read_state(settings.data_dir) is None  # or the next `up` would find it ready
    assert not end_left_behind(settings.data_dir, read_state(settings.data_dir))


def test_the_whole_tree_of_an_instance_ends_and_nothing_else(instance: str, tmp_path: Path) -> None:
    bystander = start("other", SLEEPER, environment("another"), tmp_path / "log")
    parent = start("parent", PARENT, environment(instance), tmp_path / "log")
    until(lambda: len(list(marked(instance))) == 2)
    assert end_marked(instance) == 2
    assert list(marked(instance)) == []
    assert bystander.alive and not parent.alive
    bystander.process.kill()
    bystander.process.wait()


def test_a_program_that_writes_over_its_environment_is_still_found(instance: str, tmp_path: Path) -> None:
    """As Ray's agents do: the first 63 bytes of what /proc shows are lost."""
    environment = {**mark(instance), "PATH": os.environ["PATH"]}
    shown = "\0".join(f"{name}={value}" for name, value in environment.items())
    kept = dict(line.split("=", 1) for line in shown[63:].split("\0"))
    left = start("left", SLEEPER, kept, tmp_path / "log")
    until(lambda: [process.pid for process in marked(instance)] == [left.process.pid])
    assert end_marked(instance) == 1 and not left.alive


def test_one_that_shows_nothing_of_its_environment_is_found_by_its_session(instance: str, tmp_path: Path) -> None:
    """As Ray's agents were, long after their raylet: that had started them, in the session of the Ray head."""
    nameless = [
        sys.executable,
        "-c",
        "import subprocess, time; subprocess.Popen(['sleep', '600'], env={}); time.sleep(600)",
    ]
    left, gone = (start(name, nameless, environment(instance), tmp_path / name) for name in ("left", "gone"))
    sessions = {one.process.pid for one in (left, gone)}
    until(lambda: len(in_sessions(sessions)) == 4)
    until(lambda: len(list(marked(instance))) == 2)
    gone.process.kill()
    gone.process.wait()
    assert end_marked(instance, [gone.process.pid]) == 3
    left.process.wait()
    assert in_sessions(sessions) == []


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.integration
def test_a_full_disk_neither_stops_the_service_nor_leaves_it_behind(
    settings: Settings, instance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Supervisor(settings)
    one.state.instance = instance
    looks: list[int] = []
    started: dict[str, Any] = {}

    def start_all() -> None:
        one._control = started["control"] = start("control", PARENT, environment(instance), tmp_path / "log")
        until(lambda: list(marked(instance)))
        monkeypatch.setattr(supervisor, "replace_text", full_disk)

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            one.stop()
        Supervisor._look(one)

    monkeypatch.setattr(one, "_start_all", start_all)
    monkeypatch.setattr(one, "_look", look)
    monkeypatch.setattr(supervisor, "LOOK_EVERY_S", 0.01)
    assert one.run() == 0
    assert len(looks) == 3
    assert not started["control"].alive and list(marked(instance)) == []


def test_what_does_not_start_again_is_tried_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Supervisor(settings)
    tries: list[int] = []

    def look() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("PostgreSQL did not answer within 60 s")
        one.stop()

    monkeypatch.setattr(one, "_start_all", lambda: None)
    monkeypatch.setattr(one, "_look", look)
    monkeypatch.setattr(supervisor, "LOOK_EVERY_S", 0.01)
    assert one.run() == 0
    assert len(tries) == 3


def test_an_empty_token_that_a_kill_left_is_made_again(settings: Settings) -> None:
    file = ray_head.token_file(settings)
    file.parent.mkdir(parents=True)
    file.touch()
    ray_head.make_token(settings)
    made = file.read_text()
    assert len(made) == 64 and stat.S_IMODE(file.stat().st_mode) == 0o600
    ray_head.make_token(settings)
    assert file.read_text() == made


@pytest.mark.usefixtures("bare_host")
def test_what_must_isolate_does_not_start_where_nothing_can(settings: Settings) -> None:
    with pytest.raises(Unavailable) as refused:
        check_isolation(settings.model_copy(update={"isolation": "required"}))
    assert refused.value.code == "isolation_unavailable" and "apt install bubblewrap" in str(refused.value.hint)
    check_isolation(settings)


def test_production_insists_on_isolation(settings: Settings) -> None:
    with pytest.raises(Conflict) as refused:
        check_isolation(settings.model_copy(update={"profile": "production"}))
    assert refused.value.code == "isolation_not_required"
