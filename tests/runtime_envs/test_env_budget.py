"""What goes when the disk is full, and what does not: environments of base `host`, and what was left by the killed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from builders_wheels import environment_yml

from runtime_envs.budget import Budget, keep, remove, sweep
from runtime_envs.environments import Environments
from runtime_envs.flock import held
from runtime_envs.index import PipIndex
from runtime_envs.lock import solve
from runtime_envs.materialize import LOCK, Prepared, caches_kept, lock_file
from runtime_envs.usage import in_use, using
from runtime_envs.verify import READY

SETS = (["greeter"], ["big"], ["polite"])


def make(node: Environments, index: PipIndex, packages: Sequence[str]) -> Prepared:
    return node.materialize(solve(environment_yml(*packages), index=index).lock)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "node"


@pytest.fixture
def three(node: Environments, index: PipIndex) -> list[Prepared]:
    """The first was not used for longest."""
    made = [make(node, index, packages) for packages in SETS]
    for age, one in enumerate(made):
        os.utime(one.prefix.parent / READY, (1_700_000_000 + age,) * 2)
    return made


def names(folder: Path, pattern: str) -> set[str]:
    return {path.name for path in folder.glob(pattern)}


def test_nothing_goes_while_somebody_builds(root: Path, node: Environments, three: list[Prepared]) -> None:
    with caches_kept(root):
        assert keep(root, Budget(0)) == []
    assert node.ready() == {one.fingerprint for one in three}
    assert keep(root, Budget(0)) == [one.fingerprint for one in three]


@pytest.mark.parametrize("words", ['{"conda": [{}], "pip": []}', '{"conda": 1}', "[]", "{"])
def test_a_damaged_lock_of_one_is_no_trouble_of_others(
    root: Path, node: Environments, index: PipIndex, three: list[Prepared], words: str
) -> None:
    (three[0].prefix.parent / LOCK).write_text(words)
    assert keep(root, Budget(0)) == [one.fingerprint for one in three]


def test_caches_that_nobody_uses_go_before_any_environment(
    root: Path, node: Environments, index: PipIndex, three: list[Prepared]
) -> None:
    used = keep_bytes(root)
    (root / "pkgs" / "old-1.0-0").mkdir(parents=True)
    (root / "pkgs" / "old-1.0-0" / "file").write_bytes(bytes(10**6))
    assert keep(root, Budget(used + 10**5)) == []
    assert not (root / "pkgs" / "old-1.0-0").exists()


def test_wheels_go_with_the_last_environment_that_has_them(
    root: Path, node: Environments, index: PipIndex, three: list[Prepared]
) -> None:
    kept = three[1]
    keep(root, Budget(0), spare={kept.fingerprint})
    wheels = root / "uv-cache"
    assert {path.name for path in wheels.glob("archive-v*/*/*.dist-info")} == {"big-1.0.dist-info"}
    assert names(wheels, "wheels-v*/*/*/*/*.rev") == {"1.0-py3-none-any.rev"}
    again = [make(node, index, packages) for packages in (*SETS, ["greeter", "big"])]
    assert [one.fingerprint for one in again[:3]] == [one.fingerprint for one in three]
    assert node.verify(again[0].fingerprint, full=True) == []
    assert next(again[3].prefix.rglob("m7.py")).samefile(next(kept.prefix.rglob("m7.py")))  # those were not touched


def test_what_was_just_asked_for_stays(root: Path, node: Environments, index: PipIndex, three: list[Prepared]) -> None:
    make(node, index, SETS[0])
    assert keep(root, Budget(0)) == [three[1].fingerprint, three[2].fingerprint]
    assert node.ready() == {three[0].fingerprint}


def test_what_is_asked_for_while_it_is_taken_stays(root: Path, three: list[Prepared]) -> None:
    """`remove` looks again under the lock."""
    assert not remove(root, three[0].fingerprint, lambda: False)
    with held(lock_file(root, three[0].fingerprint), 0):
        assert not remove(root, three[0].fingerprint)
    assert remove(root, three[0].fingerprint) and not remove(root, three[0].fingerprint)


def test_a_shell_in_an_environment_uses_it(root: Path, three: list[Prepared]) -> None:
    """Its interpreter does not run."""
    first, second = (one.fingerprint for one in three[:2])
    with using(root, first), using(root, first):
        assert in_use(root) == {first}
        assert first not in keep(root, Budget(0), spare={second})
    assert in_use(root) == frozenset()


def test_a_full_disk_is_no_failure_of_what_is_ready(
    root: Path, index: PipIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    du = tmp_path / "bin" / "du"
    du.parent.mkdir()
    du.write_text("#!/bin/sh\nexit 2\n")
    du.chmod(0o755)
    monkeypatch.setenv("PATH", str(du.parent), prepend=":")
    node = Environments(root, index, Budget(1))
    assert make(node, index, ["greeter"]).fingerprint in node.ready()


def test_what_the_killed_left_goes(root: Path) -> None:
    left = [root / name for name in ("repair-x", "bytecode/3.11/.new-x", "uv-cache/.tmpx")]
    for folder in (*left, root / "bytecode/3.11/kept"):
        folder.mkdir(parents=True)
    with caches_kept(root):  # one of them may be at work
        sweep(root)
    assert all(folder.exists() for folder in left)
    sweep(root)
    assert not any(folder.exists() for folder in left) and (root / "bytecode/3.11/kept").exists()


def keep_bytes(root: Path) -> int:
    return int(subprocess.run(["du", "-sB1", root], capture_output=True, text=True, check=True).stdout.split()[0])
