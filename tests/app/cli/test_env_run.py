"""`env run` after its environment is there: what the command sees, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from cli_said import Run
from fake_service import FakeService
from fastapi.responses import JSONResponse

from app.cli.commands import env_run
from app.cli.commands.env_run import in_sandbox
from app.cli.errors import HostProblem
from app.settings import Settings
from runtime_envs.lock import default_lock
from runtime_envs.sandbox.cgroup import here
from runtime_envs.sandbox.host import ability
from runtime_envs.usage import in_use

pytestmark = pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}")

LOOK = """
import os, sys
from pathlib import Path
assert Path("script.py").read_text() == "here", "where the user stands"
assert "HELIOSTAT_TOKEN" not in os.environ and os.environ["HOME"] == "/tmp/home"
for place in (".", "/", "/usr"):
    try: open(place + "/planted", "w")
    except OSError: continue
    sys.exit(place + " was written")
open("/tmp/home/kept", "w")
sys.exit(7)
"""


def test_a_command_runs_sealed_where_its_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text("here")
    tmp_path.chmod(0o755)  # inside, root's command is somebody else
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HELIOSTAT_TOKEN", "secret")
    settings = Settings(isolation="required")
    assert in_sandbox(settings, Path(sys.executable), ["python", "-S", "-c", LOOK]) == 7
    assert not list(tmp_path.glob("planted"))


def test_the_environment_is_in_use_whatever_runs_in_it(
    cli: Run, service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here another interpreter than its own: the disk budget may not take it from under a shell."""
    root, lock = tmp_path / "data" / "node", default_lock()
    monkeypatch.setenv("HELIOSTAT_ISOLATION", "off")
    look = (
        "import pathlib, sys; from runtime_envs.usage import in_use; sys.exit(len(in_use(pathlib.Path(sys.argv[1]))))"
    )
    service.answers.append(JSONResponse({"ref": "mine@1", "lock": lock}))
    said = cli("env", "run", "mine", "--", sys.executable, "-c", look, str(root))
    assert said.code == 1, said.err
    assert in_use(root) == frozenset()


def test_a_signal_and_a_command_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    settings = Settings(isolation="required")
    assert in_sandbox(settings, Path(sys.executable), ["sh", "-c", "kill -TERM $$"]) == -15
    assert in_sandbox(settings, Path(sys.executable), ["no-such-command"]) == 127


@pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")
def test_a_command_that_takes_too_much_memory_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setattr(env_run, "machine_memory_gb", lambda: 0.3)
    hog = ["python", "-S", "-c", "b'x' * (1 << 30)"]
    with pytest.raises(HostProblem, match=r"more memory than it may have here, 0\.2 GiB") as told:
        in_sandbox(Settings(isolation="required"), Path(sys.executable), hog)
    assert told.value.code == "memory_limit_exceeded" and told.value.hint
