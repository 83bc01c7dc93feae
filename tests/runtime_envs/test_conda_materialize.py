"""Conda prefixes on a node: their own interpreter, shared files, concurrency, channels that break, full disks."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_channel import MODULES, ChannelServer, conda_yml

from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import BUILD_FAILED, CHANNEL_FAILED, DISK_FULL, EnvironmentProblem
from runtime_envs.materialize import Prepared

pytestmark = pytest.mark.integration


def lock_of(places: CondaPlaces, *conda: str, pip: tuple[str, ...] = ()) -> dict[str, Any]:
    return solve_environment(conda_yml(*conda, pip=pip), places).lock


def run(prepared: Prepared, code: str) -> str:
    done = subprocess.run([prepared.python, "-c", code], capture_output=True, text=True, check=True, env={})
    return done.stdout.strip()


LIB = "lib/python3.11"
SITE = f"{LIB}/site-packages"


def test_an_interpreter_of_its_own(node: Environments, places: CondaPlaces) -> None:
    made = node.materialize(lock_of(places, "polite", pip=("big",)))
    code = "import sys, ssl, torch, greeter, big.m7; print(sys.prefix, torch.VERSION, greeter.VERSION, big.m7.VALUE)"
    assert run(made, code).split() == [str(made.prefix), "2.5.0+cpu", "1.0", "7"]
    assert node.verify(made.fingerprint, full=True) == []
    assert list(made.stages) == ["download", "link", "pip", "byte_code", "manifest"]
    assert "heliostat_prefix_" not in next(made.prefix.rglob("_sysconfigdata*.py")).read_text()


def test_two_environments_share_files_and_byte_code(node: Environments, places: CondaPlaces) -> None:
    one, two = (node.materialize(lock_of(places, *packages)) for packages in (["greeter<2"], ["polite", "big"]))
    byte_code = f"{SITE}/__pycache__/greeter.cpython-311.pyc"
    for name in ("bin/python3.11", f"{SITE}/greeter.py", byte_code, f"{LIB}/json/decoder.py"):
        assert (one.prefix / name).samefile(two.prefix / name)
    assert len(list(two.prefix.rglob("big/__pycache__/m*.pyc"))) == MODULES


def test_python_takes_the_byte_code(node: Environments, places: CondaPlaces) -> None:
    made = node.materialize(lock_of(places, pip=("greeter",)))
    for module in (f"{LIB}/json/decoder.py", f"{SITE}/torch.py", f"{SITE}/greeter.py"):  # Python's, conda's, pip's
        source = made.prefix / module
        header = (source.parent / "__pycache__" / f"{source.stem}.cpython-311.pyc").read_bytes()[:16]
        flags, mtime, size = struct.unpack("<III", header[4:])
        assert (flags, mtime, size) == (0, int(source.stat().st_mtime), source.stat().st_size)


def test_others_can_read_it(node: Environments, places: CondaPlaces) -> None:
    made = node.materialize(lock_of(places, "greeter"))
    for path in [made.prefix.parent, *made.prefix.parent.rglob("*")]:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 in ((0o755,) if path.is_dir() else (0o644, 0o755)), path


def test_eight_at_once_make_one(node: Environments, places: CondaPlaces) -> None:
    lock = lock_of(places, "big")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: node.materialize(lock), range(8)))
    assert sum("manifest" in one.stages for one in made) == 1
    assert node.verify(made[0].fingerprint, full=True) == []


def test_eight_different_ones_at_once(node: Environments, places: CondaPlaces) -> None:
    greeters = ([], ["greeter<2"], ["greeter>=2"], ["polite"])
    locks = [lock_of(places, *packages, *more) for packages in greeters for more in ([], ["big"])]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(node.materialize, locks))
    assert node.ready() == {one.fingerprint for one in made} and len(node.ready()) == 8
    for one in made:
        assert node.verify(one.fingerprint, full=True) == []


def test_a_download_that_breaks_off(node: Environments, places: CondaPlaces, channel: ChannelServer) -> None:
    others = node.materialize(lock_of(places))
    lock = lock_of(places, "big")
    channel.broken.add("big-")
    try:
        with pytest.raises(EnvironmentProblem) as caught:
            node.materialize(lock)
    finally:
        channel.behave()
    assert (caught.value.code, caught.value.fixable_by) == (CHANNEL_FAILED, "operator")
    assert node.ready() == {others.fingerprint}
    channel.log.clear()
    made = node.materialize(lock)
    assert node.verify(made.fingerprint, full=True) == []
    assert channel.log == ["/noarch/big-1.0-py_0.conda"]  # what had arrived was kept


def test_a_package_may_not_replace_the_interpreter(node: Environments, places: CondaPlaces) -> None:
    for lock in (lock_of(places, "hijack"), lock_of(places, pip=("hijack_pip",))):
        with pytest.raises(EnvironmentProblem) as caught:
            node.materialize(lock)
        assert caught.value.code == BUILD_FAILED
    assert node.ready() == frozenset()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small_disk: Path, places: CondaPlaces) -> None:
    node = Environments(small_disk / "node", places.index)
    (small_disk / "ballast").write_bytes(b"\0" * 34 * 1024**2)
    with pytest.raises(EnvironmentProblem) as caught:
        node.materialize(lock_of(places, "big"))
    assert (caught.value.code, caught.value.fixable_by) == (DISK_FULL, "operator")
    assert node.ready() == frozenset()


def test_a_cache_on_another_disk_is_refused(small_disk: Path, tmp_path: Path, places: CondaPlaces) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "pkgs").symlink_to(small_disk)
    with pytest.raises(EnvironmentProblem, match="two filesystems"):
        Environments(tmp_path / "node", places.index).materialize(lock_of(places))


@pytest.mark.parametrize("cache", ["pkgs", "downloads", "uv-cache"])
def test_so_is_one_on_another_mount_of_the_same_disk(cache: str, tmp_path: Path, places: CondaPlaces) -> None:
    """Links do not go from mount to mount, though both say that they are of one device."""
    folder, elsewhere = tmp_path / "node" / cache, tmp_path / "elsewhere"
    for one in (folder, elsewhere):
        one.mkdir(parents=True)
    done = subprocess.run(["mount", "--bind", elsewhere, folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no right to mount: {done.stderr.strip()}")
    try:
        with pytest.raises(EnvironmentProblem, match=f"{cache} and .* lie on two filesystems"):
            Environments(tmp_path / "node", places.index).materialize(lock_of(places))
    finally:
        subprocess.run(["umount", folder], check=True)
    assert list(elsewhere.iterdir()) == []


def test_another_channel_folder_is_no_obstacle(
    node: Environments, places: CondaPlaces, channel_folder: Path, tmp_path: Path
) -> None:
    policy = replace(places.policy, channels={"conda-forge": channel_folder.as_uri()})
    lock = lock_of(CondaPlaces(policy, tmp_path / "cache", places.index), "greeter")
    assert run(node.materialize(lock), "import greeter; print(greeter.VERSION)") == "2.0"
