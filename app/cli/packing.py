"""Packs a project's folder for upload: what is no part of the project is left out, and the same files give the same bytes."""

from __future__ import annotations

import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from app.cli.errors import HostProblem

LEFT_OUT = frozenset(
    (
        *(".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", ".ipynb_checkpoints", ".DS_Store"),
        *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".idea", ".vscode"),
    )
)


def pack(folder: Path, sink: IO[bytes]) -> None:
    """A .tar.gz of its files. Raises `HostProblem`."""
    files = list(_files(folder))
    if not files:
        raise HostProblem(f"{folder} holds no file", code="nothing_to_upload")
    with gzip.GzipFile(filename="", mode="wb", fileobj=sink, mtime=0) as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for file in files:
                header = tarfile.TarInfo(file.relative_to(folder).as_posix())
                header.size = file.stat().st_size
                with file.open("rb") as source:
                    tar.addfile(header, source)


def _files(folder: Path) -> Iterator[Path]:
    """Sorted. A link is followed to a file of the same project; no other place is taken along unasked."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted((*names, *(one for one in folders if Path(root, one).is_symlink()))):
            path = Path(root, name)
            if name in LEFT_OUT or path.suffix == ".pyc":
                continue
            if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
                raise HostProblem(
                    f"{path} is a link out of the folder, or no file",
                    code="not_packable",
                    hint="copy it there, or upload an archive of your own",
                )
            yield path
