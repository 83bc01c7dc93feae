from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime_envs.usage import disk_bytes

GONE = "du: cannot access 'uv-cache/.tmpX': No such file or directory"
UNREAD = "du: cannot read directory 'envs/a': Permission denied"


@pytest.fixture
def du(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes one that counts 8192 bytes, says this and ends so."""

    def write(said: str, end: str) -> None:
        program = tmp_path / "du"
        program.write_text(f"#!/bin/sh\necho 8192 .\ncat >&2 <<'END'\n{said}\nEND\n{end}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return write


def test_files_that_go_while_they_are_counted(tmp_path: Path, du: Callable[[str, str], None]) -> None:
    du(f"{GONE}\n{GONE}", "exit 1")
    assert disk_bytes(tmp_path) == 8192


@pytest.mark.parametrize(
    ("said", "end"), [(UNREAD, "exit 1"), (f"{GONE}\n{UNREAD}", "exit 1"), (GONE, "exit 2"), (GONE, "kill -9 $$")]
)
def test_what_was_not_counted_is_no_count(tmp_path: Path, du: Callable[[str, str], None], said: str, end: str) -> None:
    du(said, end)
    with pytest.raises(subprocess.CalledProcessError):
        disk_bytes(tmp_path)


def test_files_go_in_every_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, du: Callable[..., None]) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    du(GONE, "[ $LC_ALL = C ] && exit 1; exit 2")
    assert disk_bytes(tmp_path) == 8192


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(1024 * 1024))
    alone = disk_bytes(tmp_path)
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    assert 1024 * 1024 <= disk_bytes(tmp_path) == alone


def test_what_is_not_there_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        disk_bytes(tmp_path / "gone")
