"""`up`, `down`, `status` with a stand-in for the supervisor: a real process with the same state file."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cli_said import Run

from app.cli import local_service
from app.cli.contexts import Context, Contexts, load_contexts, save_contexts
from app.cli.local_service import Launch, read_state, supervisor_of

STUB = Path(__file__).with_name("supervisor_stub.py")


@pytest.fixture
def data(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data folder whose supervisor is the stub; nothing is left running."""

    def command(launch: Launch) -> list[str]:
        port = ["--port", str(launch.port)] if launch.port is not None else []
        return [sys.executable, str(STUB), "app.supervisor", "--data-dir", str(launch.data_dir), *port]

    monkeypatch.setattr(Launch, "command", command)
    folder = home / "data"
    yield folder
    process = supervisor_of(folder, read_state(folder))
    if process is not None:
        process.kill()
        process.wait(60)


def test_up_status_down(offline: Run, data: Path) -> None:
    up = offline("up", "--detach", "--port", "auto")
    assert up.code == 0
    assert "http://127.0.0.1:1" in up.out
    lines = up.out.splitlines()
    assert any("whoami" in line for line in lines)
    assert any(line.startswith("curl -H") and f"{data}/keys/default.token" in line for line in lines)
    assert any('OpenAI(base_url="http://127.0.0.1:1/v1"' in line for line in lines)
    assert "default-token" not in up.out
    assert "database" in up.err or "ready" in up.err
    again = offline("up", "--detach", "--json")
    assert again.code == 0
    assert again.json["already_running"] is True
    shown = offline("status", "--json")
    assert (shown.code, shown.json["ready"]) == (0, True)
    assert "ray" in offline("status").out
    assert offline("down", "--json").json["stopped"] is True
    assert offline("status").code == 3
    assert "kept" in offline("down").out
    assert data.is_dir()


def test_up_saves_contexts_for_tenant_and_operator(offline: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HELIOSTAT_TOKEN", "not for the service")
    shown = offline("up", "-d", "--port", "auto", "--json").json
    saved = load_contexts()
    assert saved.current == "default"
    assert saved.get("operator") == Context("http://127.0.0.1:1", None, str(data / "keys" / "operator.token"))
    assert stat.S_IMODE(Path(shown["contexts"]).stat().st_mode) == 0o600
    assert shown["arguments"][-2:] == ["--port", "0"]
    assert shown["token_given"] is False


def test_up_leaves_another_current_context_alone(offline: Run, data: Path) -> None:
    save_contexts(Contexts("prod", {"prod": Context("https://prod", "t")}))
    said = offline("up", "-d", "--port", "auto")
    assert load_contexts().current == "prod"
    assert "whoami --context default" in said.out


@pytest.mark.parametrize(("mode", "told"), [("crash", "no room for a database"), ("error", "port 8000 is taken")])
def test_up_that_fails_says_why(
    offline: Run, data: Path, monkeypatch: pytest.MonkeyPatch, mode: str, told: str
) -> None:
    monkeypatch.setenv("STUB", mode)
    said = offline("up", "-d", "--port", "auto")
    assert said.code == 1
    assert told in said.err


def test_up_names_who_holds_the_port(offline: Run, data: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        said = offline("up", "--port", str(holder.getsockname()[1]))
    assert said.code == 1
    assert f"process {os.getpid()}" in said.err
    assert "--port auto" in said.err
    assert not data.exists()


def test_up_takes_no_folder_with_somebodys_files(offline: Run, data: Path) -> None:
    data.mkdir()
    (data / "thesis.txt").touch()
    said = offline("up", "-d", "--port", "auto")
    assert said.code == 1
    assert [path.name for path in data.iterdir()] == ["thesis.txt"]


def test_purge(offline: Run, data: Path) -> None:
    assert offline("up", "-d", "--port", "auto").code == 0
    assert offline("down", "--purge").code == 2  # nobody there to be asked
    assert offline("down", "--purge", "--yes").code == 0
    assert not data.exists()
    assert load_contexts().contexts == {}


def test_purge_removes_nothing_that_is_not_ours(offline: Run, data: Path) -> None:
    data.mkdir()
    (data / "thesis.txt").touch()
    assert offline("down", "--purge", "--yes").code == 1
    assert (data / "thesis.txt").exists()


def test_down_ends_no_process_that_only_has_the_number(offline: Run, data: Path) -> None:
    """After a crash the number in the state file may be anybody's."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as bystander:
        (data / "run").mkdir(parents=True)
        state = {"pid": bystander.pid, "started_at": time.time()}
        (data / "run" / "supervisor.json").write_text(json.dumps(state))
        said = offline("down", "--json")
        assert said.json["stopped"] is False
        assert bystander.poll() is None
        bystander.kill()


def test_up_after_a_crash_does_not_take_the_last_services_word(offline: Run, data: Path) -> None:
    (data / "run").mkdir(parents=True)
    (data / "heliostat.data").touch()
    old = {"pid": 2**22 + 1, "started_at": 0.0, "ready": True, "url": "http://127.0.0.1:9", "phase": "ready"}
    (data / "run" / "supervisor.json").write_text(json.dumps(old))
    assert offline("up", "--detach", "--port", "auto").code == 0
    state = read_state(data)
    assert state is not None and state["pid"] != old["pid"] and state["url"] != old["url"]
    assert offline("down").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_in_the_foreground_stops_with_ctrl_c(data: Path, number: signal.Signals) -> None:
    code = (
        "import sys; from app.cli import local_service as l, main\n"
        f"l.Launch.command = lambda s: [sys.executable, {str(STUB)!r}, 'app.supervisor', '--data-dir', str(s.data_dir)]\n"
        "main.app(['up', '--port', 'auto'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "is up" in process.stdout.readline()
    state = read_state(data)
    assert state is not None
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not psutil.pid_exists(state["pid"])


def test_settings_that_do_not_hold(offline: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "heliostat.toml"
    file.write_text("[http]\nport = 'many'\n")
    monkeypatch.setenv("HELIOSTAT_CONFIG_FILE", str(file))
    said = offline("up")
    assert said.code == 2
    assert "http.port" in said.err


def test_the_supervisors_names_are_ours() -> None:
    """The command does not import the supervisor (it would load the database's libraries), so the names stand twice."""
    from app import supervisor

    assert local_service.MARKER == supervisor.MARKER
    folder = Path("data")
    assert supervisor.state_file(folder) == folder / "run" / "supervisor.json"
