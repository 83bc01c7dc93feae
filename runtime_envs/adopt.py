"""Wheels are installed aside, and what they brought is moved into the prefix afterwards: a wheel can bring any file, and in the prefix
lies what the platform believes (conda-meta, pyvenv.cfg) and what others share by hard links. Nothing that is there is replaced."""

from __future__ import annotations

import csv
import filecmp
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime_envs.errors import BUILD_FAILED, EnvironmentProblem
from runtime_envs.verify import names_in

META = "conda-meta"
RESERVED = frozenset((META, "pyvenv.cfg"))
"""Say what a prefix is; no package's own, whether they are there or not."""
INSTALLERS = ".lock"
"""uv's own, beside what it installs."""


def fold(staged: Path, prefix: Path) -> None:
    """Where the prefix has a folder under two names (lib64 is a link to lib), what wheels brought under the second goes to the first:
    two may not be moved to one place. Raises as `adopt`."""
    for link in prefix.iterdir():
        here, twin = staged / link.name, staged / link.resolve().name
        if not link.is_symlink() or link.resolve().parent != prefix.resolve() or not here.is_dir():
            continue
        if twin.is_dir():
            adopt(here, twin)
        else:
            here.rename(twin)


def adopt(staged: Path, prefix: Path) -> list[str]:
    """Moves the tree `staged` (gone afterwards) into `prefix`, both on one filesystem; the names of its files there. A file that
    another package has brought with the same contents stays that one's. Raises EnvironmentProblem (`environment_build_failed`)."""
    (staged / INSTALLERS).unlink(missing_ok=True)
    root = prefix.resolve()
    moved: list[str] = []
    for here, there in list(_moves(staged, root)):  # all of them, before the first is made
        here.rename(there)
        name = there.relative_to(root).as_posix()
        moved += [f"{name}/{below}" for below in names_in(there)] if there.is_dir() else [name]
    shutil.rmtree(staged)
    return moved


def _moves(staged: Path, root: Path) -> Iterator[tuple[Path, Path]]:
    folders = [(staged, root)]
    while folders:
        folder, target = folders.pop()
        for here in sorted(folder.iterdir()):
            there = target / here.name
            if here.is_symlink() or there.relative_to(root).parts[0] in RESERVED:
                raise _refused(staged, here)
            if not os.path.lexists(there):
                yield here, there
            elif here.is_dir() and there.is_dir() and there.resolve().is_relative_to(root):
                folders.append((here, there.resolve()))  # lib64 is a link to lib
            elif not _needless(here, there):
                raise _refused(staged, here)


def _needless(here: Path, there: Path) -> bool:
    if here.is_dir() or there.is_symlink() or not there.is_file():
        return False
    # byte code belongs to the source that is there
    return here.suffix == ".pyc" or filecmp.cmp(here, there, shallow=False)


def _refused(staged: Path, file: Path) -> EnvironmentProblem:
    file = next((file / below for below in names_in(file)), file)
    name = file.relative_to(staged).as_posix()
    return EnvironmentProblem(
        BUILD_FAILED,
        f"{_owner(staged, file)} writes over the environment's own Python or settings, or over another package's file: it brings "
        f"`{name}`, which pip packages may not replace.",
        hint="Leave out the package that brings this file, or take all of what it stands for from pip, or from conda.",
    )  # fmt: skip


def _owner(staged: Path, file: Path) -> str:
    """By uv's own list of each package's files."""
    for record in staged.glob("lib*/python3*/site-packages/*.dist-info/RECORD"):
        with record.open(encoding="utf-8", errors="replace", newline="") as rows:
            places = (Path(os.path.normpath(record.parents[1] / row[0])) for row in csv.reader(rows) if row)
            if any(place == file or file in place.parents for place in places):
                return f"The pip package `{record.parent.name.removesuffix('.dist-info')}`"
    return "A package of this environment"
