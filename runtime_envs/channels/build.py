"""`heliostat channel build`: a local conda channel from wheels and interpreters, for places that no channel reaches."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename

from runtime_envs.channels import interpreter as interpreters
from runtime_envs.channels import wheels as converted
from runtime_envs.channels.bytecode import with_byte_code
from runtime_envs.channels.interpreter import Interpreter
from runtime_envs.channels.package import NOARCH, Entry, Package, write_package
from runtime_envs.channels.wheels import Wheel
from runtime_envs.conda.engine import index_channel
from runtime_envs.errors import INVALID, EnvironmentProblem
from runtime_envs.pip import python_tags


@dataclass(frozen=True)
class BuiltChannel:
    """`missing`: what the packages need and the wheels do not have, as conda names. `skipped`: wheels of another Python or
    platform, by file name."""

    folder: Path
    packages: tuple[str, ...]
    missing: tuple[str, ...]
    skipped: tuple[str, ...]


def build_channel(
    folder: Path, wheels: Sequence[Path], python: Interpreter, report: Callable[[str], None] = lambda _: None
) -> BuiltChannel:
    """Adds the interpreter and those of the wheels (files) that it can use here to the channel in `folder`, and indexes it.
    Packages that are in it stay as they are, because locks name their hashes: a second call adds another Python and the wheels
    for it. Raises `environment_invalid` for what is not a wheel."""
    (folder / NOARCH).mkdir(parents=True, exist_ok=True)
    read, skipped = _read(wheels, python)
    by_name = {wheel.name: wheel for wheel in read}
    contents: list[tuple[Package, Iterable[Entry]]] = [(interpreters.describe(python), interpreters.entries(python))]
    contents += [(converted.describe(wheel, by_name), converted.entries(wheel)) for wheel in read]
    for package, entries in contents:
        if not package.file(folder).exists():
            report(package.stem)
            write_package(folder, package, with_byte_code(entries, python.command, python.tag))
    packages = [package for package, _ in contents]
    index_channel(folder)
    return BuiltChannel(folder, tuple(package.stem for package in packages), _missing(packages), skipped)


def _read(paths: Sequence[Path], python: Interpreter) -> tuple[list[Wheel], tuple[str, ...]]:
    """Those that this Python can use here, and the names of the others."""
    usable = frozenset(python_tags(python.version))
    wheels = [Wheel(path, python.version) for path in paths]
    fitting: list[Wheel] = []
    for wheel in wheels:
        try:
            if usable & wheel.tags:
                _ = wheel.name, wheel.metadata, wheel.pure
                fitting.append(wheel)
        except (InvalidWheelFilename, zipfile.BadZipFile, StopIteration, KeyError, OSError) as error:
            raise EnvironmentProblem(
                INVALID, f"{wheel.path} is not a wheel: {error}", hint="Give wheels (.whl)."
            ) from error
    return fitting, tuple(wheel.path.name for wheel in wheels if wheel not in fitting)


def _missing(packages: Sequence[Package]) -> tuple[str, ...]:
    names = {package.name for package in packages}
    needed = {re.split(r"[ =<>!~]", depends, maxsplit=1)[0] for package in packages for depends in package.depends}
    return tuple(sorted(needed - names))
