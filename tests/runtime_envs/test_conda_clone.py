"""Environments made from one that is like them: the same, file by file, as from their packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_channel import conda_yml
from waiting import until

from runtime_envs.conda import engine
from runtime_envs.conda.materialize import CondaEnvironments
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import UNSOLVABLE, EnvironmentProblem
from runtime_envs.fingerprint import identity

pytestmark = pytest.mark.integration
SITE = "lib/python3.11/site-packages"


def lock_of(places: CondaPlaces, *conda: str, pip: tuple[str, ...] = ()) -> dict[str, Any]:
    return solve_environment(conda_yml(*conda, pip=pip), places).lock


def contents(prefix: Path) -> dict[str, tuple[int, bytes | str]]:
    """Byte code by name: where it is compiled on the node it differs from run to run."""
    found = {}
    for path in prefix.rglob("*"):
        name = path.relative_to(prefix).as_posix()
        if path.is_symlink():
            found[name] = 0, str(path.readlink())
        elif path.is_file():
            found[name] = path.stat().st_mode, b"" if name.endswith(".pyc") else path.read_bytes()
    return found


CASES: dict[str, tuple[list[str], list[str], tuple[str, ...]]] = {
    "less": (["polite", "big"], ["big"], ()),
    "more": (["greeter<2"], ["greeter<2", "big"], ()),
    "another version": (["greeter<2", "big"], ["greeter>=2", "big"], ()),
    "pip beside it": (["greeter<2"], ["greeter<2"], ("big",)),
    "one of two that share a path": (["left", "right"], ["right"], ()),
}


@pytest.mark.parametrize(("before", "after", "pip"), CASES.values(), ids=CASES)
def test_the_same_as_from_its_packages(
    before: list[str], after: list[str], pip: tuple[str, ...], node: Environments, places: CondaPlaces, tmp_path: Path
) -> None:
    node.materialize(lock_of(places, *before))
    lock = lock_of(places, *after, pip=pip)
    made = node.materialize(lock)
    assert "clone" in made.stages
    assert node.verify(made.fingerprint, full=True) == node.verify(made.fingerprint, full=False) == []
    cloned = contents(made.prefix)
    shutil.rmtree(made.prefix.parent)
    again = CondaEnvironments(tmp_path / "node", places.index).materialize(lock, like_others=False)
    assert "clone" not in again.stages and again.prefix == made.prefix
    assert contents(again.prefix) == cloned


def test_a_path_that_a_new_package_has_too(node: Environments, places: CondaPlaces) -> None:
    node.materialize(lock_of(places, "left"))
    both = node.materialize(lock_of(places, "left", "right"))
    assert node.verify(both.fingerprint, full=True) == []
    assert len(list(both.prefix.rglob("common.py"))) == 2  # the loser's lies aside


def test_packages_that_share_a_path_stay_together(node: Environments, places: CondaPlaces) -> None:
    """Their order among the others is the same in both."""
    first, second = (node.materialize(lock_of(places, "left", "right", *more)) for more in (["big"], []))
    assert "link" not in second.stages and node.verify(second.fingerprint, full=True) == []
    assert (second.prefix / SITE / "common.py").samefile(first.prefix / SITE / "common.py")


def test_who_wins_a_path_does_not_depend_on_what_was_here(node: Environments, places: CondaPlaces) -> None:
    """The last in topological order: the installer's rule."""
    node.materialize(lock_of(places, "left", "right", "tilts"))
    lock = lock_of(places, "left", "right")
    made = node.materialize(lock)
    assert node.verify(made.fingerprint, full=True) == []
    after_another = (made.prefix / SITE / "common.py").read_text()
    shutil.rmtree(made.prefix.parent)
    alone = node._make(lock, like_others=False)
    assert (alone.prefix / SITE / "common.py").read_text() == after_another


def test_only_what_holds_the_prefix_takes_space(node: Environments, places: CondaPlaces) -> None:
    first, second = (node.materialize(lock_of(places, *packages)) for packages in (["polite", "big"], ["polite"]))
    own = {
        path.relative_to(second.prefix).as_posix()
        for path in second.prefix.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    }
    holding = {name for name in own if str(second.prefix).encode() in (second.prefix / name).read_bytes()}
    assert own - holding == {"conda-meta/history", "conda-meta/python-3.11.7-0_cpython.json"} & own
    assert str(first.prefix).encode() not in b"".join((second.prefix / name).read_bytes() for name in own)


def replaced(path: Path) -> None:
    path.unlink()
    path.write_text("another = 1\n")


DAMAGE: dict[str, Callable[[Path], None]] = {"deleted": Path.unlink, "replaced": replaced}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", [f"{SITE}/greeter.py", "lib/python3.11/_sysconfigdata__linux_x86_64-linux-gnu.py"])
def test_a_source_that_is_damaged_is_none(
    name: str, damage: Callable[[Path], None], node: Environments, places: CondaPlaces
) -> None:
    first = node.materialize(lock_of(places, "polite", "big"))
    damage(first.prefix / name)
    second = node.materialize(lock_of(places, "polite"))
    assert "link" in second.stages  # by the installer
    assert node.verify(second.fingerprint, full=True) == []
    assert node.verify(first.fingerprint, full=True) == [name]


def test_a_damaged_description_is_not_inherited_by_its_repair(node: Environments, places: CondaPlaces) -> None:
    """`conda-meta` is one file in all environments: rebuilt from packages, not from each other."""
    both = [node.materialize(lock_of(places, *packages)) for packages in (["polite", "big"], ["polite"])]
    meta = both[0].prefix / "conda-meta" / "polite-1.0-py_0.json"
    status, data = meta.stat(), meta.read_bytes()
    meta.write_bytes(data.replace(b"polite", b"polity"))
    os.utime(meta, ns=(status.st_atime_ns, status.st_mtime_ns))
    for one in both:
        assert node.verify(one.fingerprint, full=True) == ["conda-meta/polite-1.0-py_0.json"]
    assert set(node.repair(both[0].fingerprint).environments) == {one.fingerprint for one in both}
    for one in both:
        assert node.verify(one.fingerprint, full=True) == []


BUILD = """
import json, sys
from pathlib import Path
from runtime_envs.environments import Environments
from runtime_envs.index import PipIndex
print("go", flush=True)
Environments(Path(sys.argv[1]), PipIndex(offline=True)).materialize(json.loads(sys.argv[2]))
"""


def test_killed_while_it_is_cloned(tmp_path: Path, places: CondaPlaces) -> None:
    node, lock = Environments(tmp_path / "node", places.index), lock_of(places, "polite")
    source = node.materialize(lock_of(places, "polite", "big"))
    whole_s, killed = 0.0, 0
    for number in range(-1, 10):
        arguments = [sys.executable, "-c", BUILD, str(tmp_path / "node"), json.dumps(lock)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            began = time.monotonic()
            if number < 0:  # how long it takes here
                process.wait()
                whole_s = time.monotonic() - began
            time.sleep(whole_s * max(number, 0) / 10)
            process.send_signal(signal.SIGKILL)
        killed += identity(lock) not in node.ready()
        if identity(lock) in node.ready():
            assert node.verify(identity(lock), full=True) == []
            (node.path(identity(lock)) / "READY").unlink()
    assert killed >= 3
    made = node.materialize(lock)
    assert node.verify(made.fingerprint, full=True) == node.verify(source.fingerprint, full=True) == []


# The process that solves stays ---------------------------------------------------------------------------------------


def test_a_process_that_has_ended_is_replaced(places: CondaPlaces) -> None:
    first = lock_of(places, "polite")
    idle = engine._idle[-1]
    os.kill(idle._process.pid, signal.SIGKILL)
    idle._process.wait()
    assert lock_of(places, "polite") == first


def test_what_a_channel_has_got_meanwhile_is_found(channel_folder: Path, tmp_path: Path, places: CondaPlaces) -> None:
    folder = tmp_path / "channel"
    shutil.copytree(channel_folder, folder)
    policy = replace(places.policy, channels={"conda-forge": folder.as_uri()})
    own = CondaPlaces(policy, tmp_path / "cache", places.index)
    for file in folder.glob("*/repodata*"):
        content = file.read_bytes()
        if file.suffix == ".json":
            data = json.loads(content)
            data["packages.conda"] = {n: p for n, p in data["packages.conda"].items() if p["name"] != "polite"}
            file.write_text(json.dumps(data))
        else:
            file.unlink()
    with pytest.raises(EnvironmentProblem) as caught:
        lock_of(own, "polite")
    assert caught.value.code == UNSOLVABLE
    for file in channel_folder.glob("*/repodata*"):
        shutil.copy(file, folder / file.parent.name / file.name)
    lines: list[str] = []

    def solved() -> bool:
        try:
            lines.extend(package["name"] for package in lock_of(own, "polite")["conda"])
        except EnvironmentProblem:
            return False
        return True

    until(solved)
    assert "polite" in lines
