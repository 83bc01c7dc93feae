"""Byte code for packages of a channel, made when the channel is: installers do not compile, and a node needs minutes for what a
large base holds. Python takes it as long as the files keep their time, which is the same in every package."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime_envs.channels.package import MTIME_S, PLACEHOLDER, Entry
from runtime_envs.conda.bytecode import PROCESS, byte_code_name, question_of


def with_byte_code(entries: Iterable[Entry], python: Path, tag: str) -> Iterator[Entry]:
    """The entries, then the byte code of those that are Python. `python`: an interpreter of the version of `tag`
    (`cpython-311`)."""
    with tempfile.TemporaryDirectory() as folder:
        sources, compiled = Path(folder) / "sources", Path(folder) / "compiled"
        names = []
        for entry in entries:
            yield entry
            if entry.path.endswith(".py") and entry.link_to is None and PLACEHOLDER.encode() not in entry.data:
                _write(sources / entry.path, entry.data)
                names.append((entry.path, byte_code_name(entry.path, tag)))
        _compile([(sources / source, compiled / target) for source, target in names], python)
        for _, target in names:
            if (compiled / target).is_file():
                yield Entry(target, (compiled / target).read_bytes())


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, (MTIME_S, MTIME_S))


def _compile(pairs: list[tuple[Path, Path]], python: Path) -> None:
    subprocess.run([python, "-I", "-S", PROCESS], input=question_of(pairs), text=True, check=True, capture_output=True)
