from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from builders_wheels import environment_yml, write_wheel

from runtime_envs.environments import Environments
from runtime_envs.errors import BUILD_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.lock import default_lock, solve
from runtime_envs.materialize import HostEnvironments, Prepared
from runtime_envs.verify import full_verify


def lock_of(index: PipIndex, *pip: str) -> dict[str, Any]:
    return solve(environment_yml(*pip), index=index).lock


def run(prepared: Prepared, code: str) -> str:
    done = subprocess.run([prepared.python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_prefix_has_its_packages_over_the_platforms(environments: HostEnvironments, index: PipIndex) -> None:
    prepared = environments.materialize(lock_of(index, "greeter<2", "six==1.0"))
    code = "import greeter, six, packaging, sys; print(greeter.VERSION, six.VERSION, packaging.__version__, sys.prefix)"
    assert run(prepared, code).split() == ["1.0", "1.0", version("packaging"), str(prepared.prefix)]


def test_the_default_environment(environments: HostEnvironments) -> None:
    prepared = environments.materialize(default_lock())
    found = run(prepared, "from importlib.metadata import version; print(version('torch'), version('peft'))")
    assert found.split() == [version("torch"), version("peft")]
    assert environments.ready() == {prepared.fingerprint}
    assert prepared.prefix.is_relative_to(environments.path(prepared.fingerprint))


def test_made_once(environments: HostEnvironments, index: PipIndex) -> None:
    lock = lock_of(index, "greeter")
    first = environments.materialize(lock)
    home = environments.path(first.fingerprint)
    made = (home / "manifest.json.gz").stat().st_mtime_ns
    os.utime(home / "READY", (0, 0))
    asked = time.time()
    again = environments.materialize(json.loads(json.dumps(lock)))
    assert again == first and (home / "manifest.json.gz").stat().st_mtime_ns == made
    assert list(first.stages) == ["prefix", "pip", "byte_code", "manifest"] and list(again.stages) == ["verify"]
    assert (home / "READY").stat().st_mtime > asked - 1  # the last use


def test_four_at_once_make_one(environments: HostEnvironments, index: PipIndex) -> None:
    lock = lock_of(index, "big", "greeter")
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: (environments.materialize(lock).prefix).stat().st_ino, range(4)))
    assert len(set(made)) == 1
    (fingerprint,) = environments.ready()
    assert full_verify(environments.path(fingerprint)) == []


def test_two_environments_share_their_files(environments: HostEnvironments, index: PipIndex) -> None:
    one, two = (environments.materialize(lock_of(index, *pip)) for pip in (["greeter"], ["greeter", "big"]))
    inodes = {next(p.prefix.rglob("greeter.py")).stat().st_ino for p in (one, two)}
    assert len(inodes) == 1


def test_byte_code_is_made_beforehand_and_modes_let_others_read(
    environments: HostEnvironments, index: PipIndex
) -> None:
    prepared = environments.materialize(lock_of(index, "big"))
    assert len(list(prepared.prefix.rglob("__pycache__/m*.pyc"))) == 100
    for path in [prepared.prefix.parent, *prepared.prefix.parent.rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 in ((0o755,) if path.is_dir() else (0o644, 0o755)), path


def test_no_code_of_the_tenant_runs_while_building(
    environments: HostEnvironments, wheels: Path, tmp_path: Path
) -> None:
    folder, ran = tmp_path / "hostile", tmp_path / "ran"
    folder.mkdir()
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
    write_wheel(folder, "hostile", "1.0", files={"hostile.pth": code, "hostile.py": "", "sitecustomize.py": code})
    index = PipIndex(find_links=(str(folder),), offline=True, cache_dir=tmp_path / "cache")
    prepared = HostEnvironments(tmp_path / "node", index).materialize(lock_of(index, "hostile"))
    assert not ran.exists()
    run(prepared, "")
    assert ran.exists()  # it is really there


def test_a_wheel_may_not_replace_the_prefix_itself(environments: HostEnvironments, index: PipIndex) -> None:
    with pytest.raises(EnvironmentProblem, match="writes over") as caught:
        environments.materialize(lock_of(index, "hijack"))
    assert caught.value.code == BUILD_FAILED
    assert environments.ready() == frozenset()


def test_contents_are_checked_against_the_lock(environments: HostEnvironments, index: PipIndex) -> None:
    lock = lock_of(index, "greeter")
    lock["pip"][0]["sha256"] = "0" * 64
    with pytest.raises(EnvironmentProblem, match="greeter") as caught:
        environments.materialize(lock)
    assert (caught.value.code, caught.value.fixable_by) == (BUILD_FAILED, "operator")
    assert environments.ready() == frozenset()


def test_a_damaged_environment_is_not_handed_out(environments: HostEnvironments, index: PipIndex) -> None:
    lock = lock_of(index, "greeter")
    module = next(environments.materialize(lock).prefix.rglob("greeter.py"))
    module.write_text("VERSION = 'changed'\n")
    with pytest.raises(EnvironmentProblem, match=r"greeter\.py") as caught:
        environments.materialize(lock)
    assert caught.value.code == "environment_damaged"


def greeters(node: Environments, index: PipIndex) -> list[Prepared]:
    """Three that share a wheel's files."""
    return [node.materialize(lock_of(index, "greeter", *more)) for more in ([], ["big"], ["needs_platform"])]


def test_all_that_share_a_damaged_wheel_are_made_again(node: Environments, index: PipIndex) -> None:
    made = greeters(node, index)
    modules = [next(one.prefix.rglob("greeter.py")) for one in made]
    modules[0].write_text("VERSION = 'changed'\n")
    assert modules[1].read_text() == "VERSION = 'changed'\n"
    done = node.repair(made[1].fingerprint)
    assert set(done.environments) == {one.fingerprint for one in made}
    assert [module.read_text() for module in modules] == ['VERSION = "2.0"\n'] * 3
    assert modules[0].samefile(modules[1])
    assert [node.verify(one.fingerprint, full=True) for one in made] == [[]] * 3


def test_one_of_them_that_a_job_uses_is_left(node: Environments, index: PipIndex) -> None:
    made = greeters(node, index)
    next(made[0].prefix.rglob("greeter.py")).write_text("VERSION = 'changed'\n")
    with subprocess.Popen([made[2].python, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as job:
        assert set(node.repair(made[1].fingerprint).environments) == {made[0].fingerprint, made[1].fingerprint}
        job.communicate()
    assert node.verify(made[2].fingerprint, full=False) != []
    assert node.repair(made[2].fingerprint).environments == (made[2].fingerprint,)


def test_an_environment_without_its_prefix_is_made_again(node: Environments, index: PipIndex) -> None:
    made = node.materialize(lock_of(index, "greeter"))
    shutil.rmtree(made.prefix)
    node.repair(made.fingerprint)
    assert node.verify(made.fingerprint, full=True) == [] and run(made, "import greeter") == ""


def test_a_disk_that_cannot_be_written(tmp_path: Path, index: PipIndex) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="could not be made"):
        HostEnvironments(tmp_path / "file", index).materialize(default_lock())


def test_only_fingerprints_are_folders(environments: HostEnvironments) -> None:
    assert environments.ready() == frozenset()
    with pytest.raises(ValueError, match="not a fingerprint"):
        environments.path("../../etc")


def test_the_interpreter_is_the_platforms(environments: HostEnvironments) -> None:
    prepared = environments.materialize(default_lock())
    assert run(prepared, "import sys; print(sys.base_prefix)") == sys.base_prefix
