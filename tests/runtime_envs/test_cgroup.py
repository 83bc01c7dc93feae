"""Groups of the kernel that this host has: a hog, a fork bomb, left-overs; version 2, where the host has none, by a folder
that looks like it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from waiting import lives, until

from runtime_envs.sandbox import cgroup
from runtime_envs.sandbox.cgroup import LEAF, Group, Plan, here, planned, possible, settle, sweep
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.process import prepared
from runtime_envs.sandbox.spec import Sandbox

ROOT = Path(__file__).parents[2]
MIB = 1024**2
UID = 31_235
LIMIT = 200 * MIB
AS_A_USER = ("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all")
SYSTEM_PYTHON = Path("/usr/bin/python3")
UNIFIED = next((Path(one.mountpoint) for one in psutil.disk_partitions(all=True) if one.fstype == "cgroup2"), None)

needs_groups = pytest.mark.skipif(here() is None, reason="this platform may make no control groups on this host")
needs_sandbox = pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}")

HOG = "kept = b'x' * (1 << 30); print('kept it')"
SHARED = "open('/dev/shm/kept', 'wb').write(b'x' * (1 << 30)); print('kept it')"
BOMB = """
import os, time
made = 1
try:
    while made < 500:
        if os.fork() == 0: os.setsid(); time.sleep(300)
        made += 1
except BlockingIOError: pass
print(made, flush=True)
time.sleep(300)
"""
OWNER = """
import subprocess, sys, time
from runtime_envs.sandbox import cgroup
cgroup.OURS = sys.argv[1]
group = cgroup.planned("left", 64 << 20, 64).make()
subprocess.Popen([*group.command, "/bin/sleep", "300"], start_new_session=True, stdout=subprocess.DEVNULL)
print(*group.folders, flush=True)
time.sleep(300)
"""


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> str:
    """Groups in a folder that no other sweep on this machine knows."""
    monkeypatch.setattr(cgroup, "OURS", f"heliostat-apart-{os.getpid()}")
    return cgroup.OURS


@pytest.fixture
def group() -> Iterator[Group]:
    made = planned("test", LIMIT, 40).make()
    yield made
    made.remove()
    assert not [folder for folder in made.folders if Path(folder).exists()]


def inside(group: Group, script: str) -> subprocess.Popen[str]:
    assert ability().mode is not None
    with prepared(Sandbox(uid=UID, python=Path(sys.executable)), ability().mode) as box:  # type: ignore[arg-type]
        words = [*group.command, *box.command, sys.executable, "-S", "-c", script]
        return subprocess.Popen(words, pass_fds=box.fds, env={}, stdout=subprocess.PIPE, text=True)


def pids(group: Group) -> list[int]:
    return [int(pid) for pid in (Path(group.folders[0]) / "cgroup.procs").read_text().split()]


@needs_groups
@needs_sandbox
@pytest.mark.parametrize("script", [HOG, SHARED])
def test_a_gib_at_once_is_not_had(group: Group, script: str) -> None:
    """Faster than anybody looks, and of a tmpfs, which belongs to no process."""
    with inside(group, script) as process:
        said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "kept it" not in said
    assert group.overran()


@needs_groups
@needs_sandbox
def test_a_fork_bomb_stops_and_nobody_of_it_stays(group: Group) -> None:
    with inside(group, BOMB) as process:
        assert process.stdout is not None
        assert 20 < int(process.stdout.readline()) <= 40
        left = [psutil.Process(pid) for pid in pids(group)]
        assert 20 < len(left) <= 40
        group.remove()
    until(lambda: not any(map(lives, left)))
    assert not Path(group.folders[0]).exists()


@needs_groups
def test_who_stays_below_was_not_killed_by_it(group: Group) -> None:
    done = subprocess.run([*group.command, "/bin/cat", "/proc/self/cgroup"], capture_output=True, text=True, check=True)
    assert done.stdout.count(Path(group.folders[0]).name) == len(group.folders)
    killed = subprocess.run([*group.command, "/bin/sh", "-c", "kill -9 $$"], check=False)
    assert killed.returncode == -signal.SIGKILL and not group.overran()


@needs_groups
def test_who_cannot_join_does_not_run(group: Group) -> None:
    gone = Group(group.version, (group.folders[0] + "-gone",))
    done = subprocess.run([*gone.command, "/bin/echo", "ran"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stdout == ""


@needs_groups
def test_groups_of_a_dead_owner_are_swept_and_no_others(apart: str, group: Group) -> None:
    command, environment = [sys.executable, "-c", OWNER, apart], {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            left = Group(group.version, tuple(owner.stdout.readline().split()))
            until(lambda: len(pids(left)) == 1)
            stayed = psutil.Process(pids(left)[0])
            sweep()
            assert pids(left) == [stayed.pid], "its owner lives"
        finally:
            owner.kill()
    assert lives(stayed), "no sandbox, which would have died with its owner"
    sweep()
    until(lambda: not lives(stayed))
    assert not any(Path(folder).exists() for folder in left.folders)
    assert left.folders and Path(group.folders[0]).exists()


@needs_groups
def test_a_group_takes_no_time() -> None:
    """The quickest of several: the others tell of who else is at work on this machine."""
    took = []
    for _ in range(10):
        started = time.perf_counter()
        made = planned("test", LIMIT, 40).make()
        subprocess.run([*made.command, "/bin/true"], check=True)
        made.remove()
        took.append(time.perf_counter() - started)
    assert min(took) < 0.2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="needs a Python that every user can run")
def test_an_ordinary_user_makes_none_and_says_so() -> None:
    script = (
        "from runtime_envs.sandbox.cgroup import here, planned, sweep\n"
        "group = planned('test', 1 << 30, 64).make()\n"
        "print(here(), group.folders, group.command, group.overran()); sweep(); group.remove()"
    )
    command = [*AS_A_USER, str(SYSTEM_PYTHON), "-c", script]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, cwd="/")
    assert done.stdout.split("\n")[0] == "None () [] False", done.stderr


# Version 2 -----------------------------------------------------------------------------------------------------------

V1 = """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 {root} /sys/fs/cgroup/pids rw shared:7 - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def process(root: Path, groups: str, mounts: str) -> Path:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc" / "cgroup").write_text(groups)
    (root / "proc" / "mountinfo").write_text(mounts)
    return root / "proc"


class Unified:
    """What a delegated group of version 2 looks like, apart from what its files do."""

    def __init__(self, root: Path) -> None:
        self.top = root / "fs"
        self.own = self.top / "system.slice" / "heliostat.service"
        self.own.mkdir(parents=True)
        self.files(self.own)
        self.mounts = f"30 23 0:27 / {self.top} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
        self.root = root

    def files(self, folder: Path, controllers: str = "cpu io memory pids\n") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.controllers").write_text(controllers)
        (folder / "cgroup.type").write_text("domain\n")
        for name in ("cgroup.procs", "cgroup.subtree_control"):
            (folder / name).write_text("")

    def process(self, leaf: str = "") -> Path:
        return process(self.root, f"0::/system.slice/heliostat.service{leaf}\n", self.mounts)


@pytest.fixture
def unified(tmp_path: Path) -> Unified:
    return Unified(tmp_path)


def test_version_2_below_its_own_group_or_beside_its_leaf(unified: Unified) -> None:
    assert possible(unified.process()) == [Plan(2, (str(unified.own),))]
    unified.files(unified.own / LEAF)
    assert possible(unified.process(f"/{LEAF}")) == [Plan(2, (str(unified.own),))]
    unified.files(unified.own, "cpu\n")
    assert possible(unified.process()) == [], "memory was not delegated"


def test_a_service_moves_itself_into_a_leaf(unified: Unified) -> None:
    unified.files(unified.own / LEAF)
    settle(unified.process())
    assert (unified.own / LEAF / "cgroup.procs").read_text() == "0"
    assert (unified.own / "cgroup.subtree_control").read_text() == "+memory +pids"


def test_and_back_where_others_are_in_its_group(unified: Unified) -> None:
    """The kernel refuses: here, by a folder in the file's place."""
    (unified.own / "cgroup.subtree_control").unlink()
    (unified.own / "cgroup.subtree_control").mkdir()
    settle(unified.process())
    assert (unified.own / "cgroup.procs").read_text() == "0"


def test_limits_of_version_2(unified: Unified) -> None:
    unified.files(unified.own / "heliostat")
    made = Plan(2, (str(unified.own),), "job-a1", LIMIT, 40).make()
    folder = Path(made.folders[0])
    assert folder.parent == unified.own / "heliostat" and folder.name.startswith("job-a1-")
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        "memory.max": str(LIMIT),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "40",
    }
    for above in (unified.own, folder.parent):
        assert (above / "cgroup.subtree_control").read_text() == "+memory +pids"


@pytest.mark.parametrize(("events", "overran"), [("oom 2\noom_kill 1\n", True), ("oom 0\noom_kill 1\n", False)])
def test_a_kill_is_told_from_one_for_all_of_the_machine(tmp_path: Path, events: str, overran: bool) -> None:
    (tmp_path / "memory.events").write_text(f"low 0\nhigh 0\nmax 9\n{events}oom_group_kill 0\n")
    assert Group(2, (str(tmp_path),)).overran() == overran


@pytest.mark.skipif(
    UNIFIED is None or not os.access(UNIFIED, os.W_OK) or not (UNIFIED / "cgroup.procs").exists(),
    reason="no writable hierarchy of version 2 on this host",
)
def test_version_2_kills_at_once_where_the_host_has_it() -> None:
    assert UNIFIED is not None
    folder = UNIFIED / "heliostat" / f"test-{os.getpid()}"
    folder.mkdir(parents=True)
    made = Group(2, (str(folder),))
    with subprocess.Popen([*made.command, "/bin/sh", "-c", "setsid sleep 300 & exec sleep 300"]) as process:
        until(lambda: len(pids(made)) == 2)
        made.remove()
        assert process.wait(60) == -signal.SIGKILL
    assert not folder.exists()


# Version 1 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/", "/docker/1f"])
def test_version_1_below_its_own_group_in_each_hierarchy(tmp_path: Path, root: str) -> None:
    """A container sees its own group as the top of the mount."""
    at = "" if root == "/" else root
    groups = f"8:pids:{at}/a\n4:memory:{at}/a/b\n1:name=systemd:/\n0::/\n"
    found = possible(process(tmp_path, groups, V1.format(root=root)))
    assert found == [Plan(1, ("/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/pids/a"))]


def test_no_place_where_the_mount_shows_others(tmp_path: Path) -> None:
    found = possible(process(tmp_path, "8:pids:/x\n4:memory:/x\n", V1.format(root="/docker/1f")))
    assert found == [] and possible(tmp_path / "no-such-process") == []
