from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from runtime_envs.lock import default_lock
from runtime_envs.materialize import HostEnvironments
from runtime_envs.verify import full_verify, quick_verify


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
