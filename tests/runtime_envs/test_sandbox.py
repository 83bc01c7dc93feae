"""The sandbox alone: hostile code inside of it, made by root and by a user, and what the host can do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import asked, lives, until

from runtime_envs.sandbox import watch as watching
from runtime_envs.sandbox.devices import leased
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.process import exit_code, prepared
from runtime_envs.sandbox.spec import Limits, Mode, Sandbox
from runtime_envs.sandbox.watch import FILE_COST_BYTES, Watch, folder_over, memory_over

ROOT = Path(__file__).parents[2]
ESCAPES = ROOT / "tests" / "escapes.py"
MIB = 1024**2
UID = 31_234
LIMITS = Limits(tmp_bytes=16 * MIB, shm_bytes=16 * MIB, processes=128)
SYSTEM_PYTHON = Path("/usr/bin/python3")
AS_A_USER = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")

needs_sandbox = pytest.mark.skipif(
    ability().mode is None, reason=f"no sandbox here: {ability().problem}; {ability().remedy}"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")

RUN_INSIDE = """
import json, subprocess, sys
from pathlib import Path
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.process import prepared
from runtime_envs.sandbox.spec import Limits, Sandbox
source, python, limits, targets = sys.argv[1:]
sandbox = Sandbox(uid=31234, python=Path(python), limits=Limits(**json.loads(limits)))
assert ability().mode == "userns", ability()
with prepared(sandbox, ability().mode) as box:
    sys.exit(subprocess.run([*box.command, python, "-c", source, targets], pass_fds=box.fds, env={}).returncode)
"""


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Things of others that anybody outside of the sandbox reaches."""
    with tempfile.TemporaryDirectory(prefix="neighbour-") as folder, socket.socket() as tcp:
        secret = Path(folder) / "secret"
        secret.write_text("another tenant's")
        secret.chmod(0o644)
        secret.parent.chmod(0o755)
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        with socket.socket(socket.AF_UNIX) as abstract:
            name = f"heliostat-test-{os.getpid()}"
            abstract.bind("\0" + name)
            abstract.listen()
            yield {
                "files": [str(secret)],
                "ports": [tcp.getsockname()[1]],
                "hosts": [("127.0.0.1", tcp.getsockname()[1])],
                "abstract": [name],
                "pids": [os.getpid()],
                "read_only": [folder],
                "tmpfs_bytes": LIMITS.tmp_bytes + LIMITS.shm_bytes + MIB,
                "processes": LIMITS.processes,
            }


def inside(program: list[str], **fields: Any) -> subprocess.CompletedProcess[str]:
    mode = ability().mode
    assert mode is not None
    sandbox = Sandbox(uid=UID, **{"python": Path(sys.executable), "limits": LIMITS, **fields})
    with prepared(sandbox, mode) as box:
        command = [*box.command, *program]
        return subprocess.run(
            command, pass_fds=box.fds, env={}, capture_output=True, text=True, timeout=300, check=False
        )


def results(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    said = [line for line in done.stdout.splitlines() if line.startswith("ESCAPES ")]
    assert said, f"{done.returncode}: {done.stdout}{done.stderr}"
    told: dict[str, str] = json.loads(said[0].removeprefix("ESCAPES "))
    return told


def escaped(told: dict[str, str]) -> dict[str, str]:
    assert len(told) >= 15
    return {name: result for name, result in told.items() if not result.startswith("held")}


def as_a_user(*command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))])
    environment = {"PYTHONPATH": path, "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
    words = [*AS_A_USER, str(SYSTEM_PYTHON), *command]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd="/")


@needs_sandbox
def test_nothing_of_what_hostile_code_tries_works(outside: dict[str, Any]) -> None:
    done = inside([sys.executable, "-c", ESCAPES.read_text(), json.dumps(outside)])
    assert escaped(results(done)) == {}


@needs_root
@needs_sandbox
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user can run")
def test_nor_does_it_where_the_platform_is_not_root(outside: dict[str, Any]) -> None:
    limits = json.dumps({"tmp_bytes": LIMITS.tmp_bytes, "shm_bytes": LIMITS.shm_bytes, "processes": LIMITS.processes})
    done = as_a_user("-c", RUN_INSIDE, ESCAPES.read_text(), str(SYSTEM_PYTHON), limits, json.dumps(outside))
    if "AssertionError: Ability" in done.stderr:
        pytest.skip(f"users cannot make sandboxes here: {done.stderr.splitlines()[-1]}")
    assert escaped(results(done)) == {}


@needs_root
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user can run")
def test_outside_of_a_sandbox_the_same_code_gets_through(outside: dict[str, Any]) -> None:
    looking = ESCAPES.read_text().replace("say(attempt([*LOOKING, *GREEDY]))", "say(attempt(LOOKING))")
    found = escaped(results(as_a_user("-c", looking, json.dumps({**outside, "pids": []}))))
    assert {"other_files", "ports", "addresses", "abstract_sockets", "system_calls"} <= set(found)


@needs_root
@needs_sandbox
def test_programs_of_the_tenant_never_run_as_root(tmp_path: Path) -> None:
    """Its folder comes first on PATH, and what is called before root is given up is looked for elsewhere."""
    tools = tmp_path / "prefix" / "bin"
    tools.mkdir(parents=True)
    for name in ("bwrap", "setpriv", "prlimit", "choom", "id"):
        (tools / name).write_text("#!/bin/sh\necho hostile\n")
        (tools / name).chmod(0o755)
    with prepared(Sandbox(uid=UID, python=tools / "python"), Mode.ROOT) as box:
        command = [*box.command, "/bin/sh", "-c", "id; /usr/bin/id -u"]
        done = subprocess.run(
            command, env={"PATH": f"{tools}:/usr/bin"}, pass_fds=box.fds, capture_output=True, text=True, check=False
        )
    assert done.stdout.split() == ["hostile", str(UID)], done.stderr


@needs_sandbox
def test_a_folder_to_write_into_is_the_only_one(tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data"
    for folder in (out, data):
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, UID, UID)
    script = f"echo kept > {out}/file; echo no > {data}/file; ls {tmp_path}"
    done = inside(["/bin/sh", "-c", script], read_only=(data,), writable=(out,))
    assert (out / "file").read_text() == "kept\n"
    assert "Read-only file system" in done.stderr
    assert not (data / "file").exists()
    assert done.stdout.split() == ["data", "out"]


@needs_sandbox
def test_all_of_it_dies_with_the_process_that_made_it() -> None:
    script = "setsid sleep 300 & exec sleep 300"
    mode = ability().mode
    assert mode is not None
    with prepared(Sandbox(uid=UID, python=Path(sys.executable)), mode) as box:
        made = subprocess.Popen([*box.command, "/bin/bash", "-c", script], pass_fds=box.fds, env={})
    tree: list[psutil.Process] = []
    until(lambda: [asked(process.name, "") for process in _below(made.pid, tree)].count("sleep") == 2)
    made.kill()
    made.wait()
    until(lambda: not any(map(lives, tree)))


def _below(pid: int, tree: list[psutil.Process]) -> list[psutil.Process]:
    tree[:] = psutil.Process(pid).children(recursive=True)
    return tree


@needs_sandbox
def test_a_host_that_cannot_isolate_refuses_where_it_must() -> None:
    """Such a host: the inside of a sandbox, where bubblewrap itself may do nothing."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from runtime_envs.errors import EnvironmentProblem\n"
        "from runtime_envs.sandbox.host import ability, needed\n"
        "from runtime_envs.sandbox.spec import Isolation\n"
        "print(needed(Isolation.OFF), needed(Isolation.PREFERRED), ability().problem != '', ability().remedy != '')\n"
        "try: needed(Isolation.REQUIRED)\n"
        "except EnvironmentProblem as problem: print(problem.code)\n"
    )
    paths = [str(ROOT), *(entry for entry in sys.path if entry.endswith("site-packages"))]
    done = inside([sys.executable, "-c", script, *paths], read_only=tuple(map(Path, paths)))
    assert done.stdout.splitlines() == ["None None True True", "isolation_unavailable"], done.stderr


@pytest.mark.parametrize(
    ("code", "seen"), [(0, 0), (1, 1), (137, -signal.SIGKILL), (128 + 42, 170), (255, 255), (-9, -9)]
)
def test_only_signals_with_a_name_are_signals(code: int, seen: int) -> None:
    assert exit_code(code) == seen


def test_a_tree_that_takes_too_much_memory_is_told_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "LOOK_S", 0.05)
    told: list[int] = []
    script = "import os, time; os.fork(); kept = bytearray(os.urandom(1)) * (60 << 20); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-S", "-c", script], start_new_session=True)
    watch = Watch(lambda: memory_over(process.pid, 90 * MIB), told.append)
    watch.start()
    try:
        until(lambda: bool(told))
    finally:
        watch.close()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert told[0] > 90 * MIB, "two processes with 60 MiB each"


def test_a_folder_counts_all_that_lies_below_it(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "weights").write_bytes(bytes(MIB))
    (tmp_path / "a" / "sparse").touch()
    os.truncate(tmp_path / "a" / "sparse", 100 * MIB)
    (tmp_path / "a" / "link").symlink_to("/usr")
    counted = MIB + 4 * FILE_COST_BYTES
    assert folder_over(tmp_path, counted) is None
    assert folder_over(tmp_path, counted - 1) == counted
    assert folder_over(tmp_path / "nowhere", 0) is None


def test_leased_cards_by_the_drivers_numbers(tmp_path: Path) -> None:
    """A lease counts by bus address; the device files of this driver are numbered the other way round."""
    for bus, uuid, minor in (("0000:1a:00.0", "GPU-a", 1), ("0000:3b:00.0", "GPU-b", 0)):
        folder = tmp_path / "gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t H200\nGPU UUID: \t {uuid}\nDevice Minor: \t {minor}\n")
    for name in ("nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    first = leased([0], tmp_path / "gpus", tmp_path)
    assert first.visible == "GPU-a"
    assert [file.name for file in first.files] == ["nvidiactl", "nvidia-uvm", "nvidia1"]
    assert leased([], tmp_path / "gpus", tmp_path).files == ()
    unknown = leased([1], tmp_path / "none", tmp_path)
    assert unknown.visible == "0" and [file.name for file in unknown.files][-1] == "nvidia1"
