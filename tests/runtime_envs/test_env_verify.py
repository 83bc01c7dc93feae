from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime_envs import verify
from runtime_envs.environments import Environments
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.lock import default_lock
from runtime_envs.materialize import HostEnvironments
from runtime_envs.verify import (
    FILES_A_PROCESS,
    MANIFEST,
    PREFIX,
    READY,
    build_manifest,
    full_verify,
    packed,
    quick_verify,
)

NAME = "a" * 64


@pytest.fixture
def home(environments: HostEnvironments) -> Path:
    return environments.path(environments.materialize(default_lock()).fingerprint)


def test_a_fresh_one_is_whole(home: Path) -> None:
    assert quick_verify(home) == [] and full_verify(home) == []


def test_another_size(home: Path) -> None:
    (home / "prefix/pyvenv.cfg").write_text("")
    assert quick_verify(home) == ["pyvenv.cfg"] == full_verify(home)


def test_a_quiet_change_is_found_by_the_full_check_only(home: Path) -> None:
    file = home / "prefix/pyvenv.cfg"
    status = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert quick_verify(home) == []
    assert full_verify(home) == ["pyvenv.cfg"]


def test_a_missing_file_and_a_moved_link(home: Path) -> None:
    (home / "prefix/pyvenv.cfg").unlink()
    (home / "prefix/bin/python3").unlink()
    (home / "prefix/bin/python3").symlink_to("/bin/true")
    assert quick_verify(home) == ["bin/python3", "pyvenv.cfg"] == full_verify(home)


def test_a_link_in_place_of_a_file(home: Path) -> None:
    file = home / "prefix/pyvenv.cfg"
    shutil.copy2(file, home / "copy")
    file.unlink()
    file.symlink_to(home / "copy")
    assert quick_verify(home) == ["pyvenv.cfg"] == full_verify(home)


def test_a_file_that_nobody_knows(home: Path) -> None:
    (home / "prefix/extra.pth").write_text("import os\n")
    (home / "prefix/later.pyc").write_text("")
    assert full_verify(home) == ["extra.pth"]


@pytest.mark.parametrize("text", [None, "", "{"])
def test_without_a_manifest(home: Path, text: str | None) -> None:
    (home / "manifest.json.gz").unlink()
    if text is not None:
        (home / "manifest.json.gz").write_text(text)
    assert quick_verify(home) == ["manifest.json.gz"] == full_verify(home)


def test_each_of_many_files_is_read_whole(tmp_path: Path) -> None:
    """By several processes, and largest first."""
    for number in range(2 * FILES_A_PROCESS + 7):
        _write(tmp_path, f"{number % 30}/{number}", bytes([number % 251]) * (number % 700))
    _write(tmp_path, "large", os.urandom(3 * 1024 * 1024 + 5))
    _seal(tmp_path)
    assert full_verify(tmp_path) == []

    changed = [f"{number % 30}/{number}" for number in (1, 699, 1000, 1500, 2006)]
    for name in [*changed, "large"]:
        _flip_last_byte(tmp_path / PREFIX / name)
    assert quick_verify(tmp_path) == []
    assert full_verify(tmp_path) == sorted([*changed, "large"])


def test_without_its_prefix(home: Path) -> None:
    whole = quick_verify(home)
    shutil.rmtree(home / PREFIX)
    assert whole == [] and quick_verify(home) == full_verify(home) and "pyvenv.cfg" in full_verify(home)


def test_what_is_no_file_any_more(tmp_path: Path) -> None:
    names = ["a folder", "a pipe", "a short one", "gone", "whole"]
    for name in names:
        _write(tmp_path, name, b"" if name == "a pipe" else name.encode())
    _seal(tmp_path)
    folder, pipe, short = (tmp_path / PREFIX / name for name in names[:3])
    folder.unlink()
    folder.mkdir()
    pipe.unlink()
    os.mkfifo(pipe)  # of size 0, as the file was; who opens it waits
    os.truncate(short, 3)
    (tmp_path / PREFIX / names[3]).unlink()
    assert full_verify(tmp_path) == names[:4]


def test_a_folder_in_place_of_a_link(tmp_path: Path) -> None:
    _write(tmp_path, "lib/one", b"one")
    (tmp_path / PREFIX / "lib64").symlink_to("lib")
    _seal(tmp_path)
    assert full_verify(tmp_path) == []
    (tmp_path / PREFIX / "lib64").unlink()
    shutil.copytree(tmp_path / PREFIX / "lib", tmp_path / PREFIX / "lib64")
    assert full_verify(tmp_path) == ["lib64", "lib64/one"]


def test_a_check_that_was_cut_short_finds_nothing_whole(tmp_path: Path) -> None:
    _write(tmp_path, "one", b"one")
    (tmp_path / MANIFEST).write_bytes(packed(json.dumps({"files": {"one": [3]}, "links": {}}).encode()))
    with pytest.raises(subprocess.CalledProcessError):
        full_verify(tmp_path)


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (40, "signal 40")])
def test_a_check_whose_process_was_killed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    home = _made(tmp_path)
    killed = tmp_path / "killed.py"
    killed.write_text(f"import os\nos.kill(os.getpid(), {number})\n")
    monkeypatch.setattr(verify, "PROCESS", killed)
    for check in (lambda: Environments(tmp_path).verify(NAME, full=True), lambda: Environments(tmp_path).repair(NAME)):
        with pytest.raises(EnvironmentProblem) as caught:
            check()
        assert (caught.value.code, caught.value.fixable_by) == ("environment_check_failed", "operator")
        assert NAME in caught.value.message and f"was ended by {name}." in caught.value.message
        assert caught.value.hint
    assert (home / PREFIX / "one").read_bytes() == b"one"


def test_what_is_damaged_and_has_no_lock_says_so(tmp_path: Path) -> None:
    home = _made(tmp_path)
    _flip_last_byte(home / PREFIX / "one")
    with pytest.raises(EnvironmentProblem) as caught:
        Environments(tmp_path).repair(NAME)
    assert caught.value.code == "environment_damaged" and "lock.json" in caught.value.message
    assert not home.exists()  # a job brings its lock


def test_what_only_has_another_time_gets_its_own_back(tmp_path: Path) -> None:
    """Its contents are right, so the full check alone finds nothing, and the quick one would refuse it for ever."""
    file = _made(tmp_path) / PREFIX / "one"
    was = file.stat().st_mtime_ns
    os.utime(file, (0, 0))
    assert Environments(tmp_path).repair(NAME).files == ("one",)
    assert file.stat().st_mtime_ns == was and Environments(tmp_path).repair(NAME).files == ()


def _made(root: Path) -> Path:
    home = root / "envs" / NAME
    _write(home, "one", b"one")
    _seal(home)
    (home / READY).touch()
    return home


def _write(home: Path, name: str, contents: bytes) -> None:
    (home / PREFIX / name).parent.mkdir(parents=True, exist_ok=True)
    (home / PREFIX / name).write_bytes(contents)


def _seal(home: Path) -> None:
    (home / MANIFEST).write_bytes(packed(json.dumps(build_manifest(home / PREFIX)).encode()))


def _flip_last_byte(file: Path) -> None:
    status, contents = file.stat(), file.read_bytes()
    file.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
