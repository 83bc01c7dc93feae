"""An interpreter as the conda package `python`: moved out of its own prefix, so that it runs in any. The C libraries that it
needs beyond its own remain the host's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime_envs.channels.package import PLACEHOLDER, Entry, Package
from runtime_envs.errors import INVALID, EnvironmentProblem

LEFT_OUT = frozenset(
    ("__pycache__", "site-packages", "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3")
)
ASK = "import json, platform, sys; print(json.dumps([platform.python_version(), sys.base_prefix]))"
SYSTEM_PREFIXES = (Path("/"), Path("/usr"), Path("/usr/local"))
ELF = b"\x7fELF"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Interpreter:
    """`version` as 3.11.7; `prefix` holds bin/, lib/ and include/."""

    version: str
    prefix: Path

    @property
    def minor(self) -> str:
        return ".".join(self.version.split(".")[:2])

    @property
    def command(self) -> Path:
        return self.prefix / "bin" / f"python{self.minor}"

    @property
    def tag(self) -> str:
        """Of its byte code."""
        return f"cpython-{self.minor.replace('.', '')}"


def find_interpreter(python: Path) -> Interpreter:
    """Of a `python` command, also of one in a virtual environment. Raises `environment_invalid`."""
    try:
        asked = subprocess.run(
            [python, "-I", "-S", "-c", ASK], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise _unusable(python, f"it cannot be run ({error})") from error
    version, prefix = json.loads(asked.stdout)
    if Path(prefix) in SYSTEM_PREFIXES:
        raise _unusable(python, f"it belongs to the system ({prefix})")
    return Interpreter(version, Path(prefix).resolve())


def _unusable(python: Path, why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        INVALID, f"{python} cannot become a conda package: {why}.",
        hint="Name a Python with a prefix of its own, such as one of pyenv, uv or conda.", fixable_by="operator",
    )  # fmt: skip


def describe(interpreter: Interpreter) -> Package:
    return Package(name="python", version=interpreter.version, build="0_cpython")


def entries(interpreter: Interpreter) -> Iterator[Entry]:
    binary = f"python{interpreter.minor}"
    yield _entry(interpreter, interpreter.prefix / "bin" / binary)
    for name in ("python3", "python"):
        yield Entry(f"bin/{name}", link_to=binary)
    for path in sorted((interpreter.prefix / "lib").glob("libpython*.so*")):
        yield _entry(interpreter, path)
    for folder in (f"lib/{binary}", f"include/{binary}"):
        for path in _files(interpreter.prefix / folder):
            yield _entry(interpreter, path)
    # The installer of pip packages looks for it, and an empty folder is not part of a package.
    yield Entry(f"lib/{binary}/site-packages/README.txt", b"Packages of this environment.\n")


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT and not name.startswith("config-"))
        yield from (Path(parent, name) for name in sorted(names) if not name.endswith((".pyc", ".a")))


def _entry(interpreter: Interpreter, path: Path) -> Entry:
    place = path.relative_to(interpreter.prefix).as_posix()
    if path.is_symlink() and not path.readlink().is_absolute():
        return Entry(place, link_to=str(path.readlink()))
    data, executable = path.read_bytes(), os.access(path, os.X_OK)
    old = str(interpreter.prefix).encode()
    if data.startswith(ELF):
        return Entry(place, movable(_stripped(path, data), interpreter.prefix, path.parent), executable)
    if old in data and b"\0" not in data:
        data = data.replace(old, PLACEHOLDER.encode())
    return Entry(place, data, executable)


def movable(binary: bytes, prefix: Path, folder: Path) -> bytes:
    """The search path of its libraries (`<prefix>/lib`) as one from where it lies. In place, filled up with slashes: a string in
    an ELF file can become shorter, not longer."""
    old = f"{prefix}/lib".encode()
    new = f"$ORIGIN/{os.path.relpath(prefix / 'lib', folder)}".encode()
    if len(new) > len(old):
        return binary
    for end in (b"\0", b":"):
        binary = binary.replace(old + end, new.ljust(len(old), b"/") + end)
    return binary


def _stripped(path: Path, data: bytes) -> bytes:
    """Without debug information, where `strip` is installed: two thirds of the size."""
    if shutil.which("strip") is None:
        return data
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stripped"
        done = subprocess.run(["strip", "--strip-unneeded", "-o", target, path], capture_output=True, timeout=TIMEOUT_S)
        return target.read_bytes() if done.returncode == 0 else data
