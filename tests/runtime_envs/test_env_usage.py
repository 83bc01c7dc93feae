from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from runtime_envs.usage import disk_bytes


def test_files_that_go_while_they_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    du = tmp_path / "du"
    du.write_text("#!/bin/sh\necho \"du: cannot access 'uv-cache/.tmpX'\" >&2\necho 8192 .\nexit 1\n")
    du.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert disk_bytes(tmp_path) == 8192


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(1024 * 1024))
    alone = disk_bytes(tmp_path)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert 1024 * 1024 <= disk_bytes(tmp_path) == alone


def test_what_is_not_there_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        disk_bytes(tmp_path / "gone")
