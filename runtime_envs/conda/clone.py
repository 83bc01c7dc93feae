"""A prefix from one that is ready here: the packages that both locks name are linked again from there, without the installer.

Exact: packages that share a path stay together, what holds the prefix is written anew, and a source whose files are not as its
manifest says is none."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from runtime_envs.conda.bytecode import INDEX
from runtime_envs.conda.lock import CondaLock, LockedConda
from runtime_envs.conda.manifest import Manifest
from runtime_envs.conda.prefix import Linked, Pair, meta_name, packages_of, read_prefix
from runtime_envs.flock import held
from runtime_envs.materialize import lock_file
from runtime_envs.uv import READABLE_UMASK
from runtime_envs.verify import PREFIX, is_ready, read_manifest

PROCESS = Path(__file__).with_name("link_process.py")
PYTHON = "python"

Folders = dict[str, dict[str, "list[int] | None"]]
"""Folder → name → size and time of change; None: a symbolic link."""


class NotAlike(Exception):
    """This prefix cannot be made from that one; the installer makes it."""


@dataclass(frozen=True)
class Source:
    """An environment that is ready, and what a new prefix takes from it: `packages` by name. `byte_code`: the cache of their
    Python minor. `lock_fd` is handed down: who links holds the lock, even when this process is killed."""

    prefix: Path
    byte_code: Path
    lock_fd: int
    manifest: Manifest
    packages: dict[str, Linked] = field(repr=False)

    def put(self, names: Collection[str], prefix: Path) -> Manifest:
        """Links these packages into `prefix`: the part of its manifest. Raises NotAlike, OSError (a path is taken)."""
        with self.putting(names, prefix) as part:
            return part

    @contextmanager
    def putting(self, names: Collection[str], prefix: Path) -> Iterator[Manifest]:
        """As `put`, while the body runs; until it ends the part lacks what is rewritten, which comes last."""
        packages = [package for name, package in self.packages.items() if name in names]
        shared = [name for package in packages for name in _shared(package, self.byte_code)]
        files, links = self.manifest.files, self.manifest.links
        if unknown := [name for name in shared if name not in files and name not in links]:
            raise NotAlike(unknown[0])
        part = Manifest({n: files[n] for n in shared if n in files}, {n: links[n] for n in shared if n in links})
        with _linking(part, self, prefix):
            yield part
        for name in (name for package in packages for name in package.rewritten):
            part.files[name] = _write_anew(name, files[name][2], (self.prefix, prefix))
        if PYTHON in names:  # the installer may still come, and must not write into what is shared
            part.files[meta_name(self.packages[PYTHON].filename)] = self._own_meta(prefix)

    def _own_meta(self, prefix: Path) -> list[Any]:
        name = meta_name(self.packages[PYTHON].filename)
        return _write_anew(name, self.manifest.files[name][2], (self.prefix, prefix))


def read_source(home: Path, byte_code: Path, lock: CondaLock, lock_fd: int) -> Source:
    """Raises NotAlike, OSError, ValueError, KeyError for what cannot be one."""
    manifest = Manifest(**orjson.loads(read_manifest(home)))
    packages = {
        package.name: package for package in _in_common(read_prefix(home, packages_of(home)), set(pairs(lock.conda)))
    }
    if PYTHON not in packages:
        raise NotAlike(PYTHON)
    return Source(home / PREFIX, byte_code, lock_fd, manifest, packages)


@contextmanager
def nearest(root: Path, lock: CondaLock) -> Iterator[Path | None]:
    """The environment that has most of the lock's packages, with the same interpreter. Nobody removes or repairs it meanwhile."""
    wanted = pairs(lock.conda)
    (python,) = (pair for package, pair in zip(lock.conda, wanted, strict=True) if package.name == PYTHON)
    there = {home: packages_of(home) for home in (root / "envs").glob("*")}
    alike = {home: len(packages.intersection(wanted)) for home, packages in there.items() if python in packages}
    with ExitStack() as stack:
        likest_first = sorted(alike, key=lambda home: alike[home], reverse=True)
        yield next((home for home in likest_first if _hold(stack, root, home)), None)


def pairs(packages: Iterable[LockedConda]) -> list[Pair]:
    return [(package.filename, package.sha256) for package in packages]


def _hold(stack: ExitStack, root: Path, home: Path) -> bool:
    try:
        stack.enter_context(held(lock_file(root, home.name), 0, shared=True))
    except TimeoutError:
        return False  # being built, repaired or removed
    return is_ready(home)


def _in_common(packages: Sequence[Linked], wanted: Collection[tuple[str, str]]) -> list[Linked]:
    """Those that are wanted, but for those that share a path with one that is not: who wins there depends on all of them."""
    kept = {package.name: package for package in packages if (package.filename, package.sha256) in wanted}
    disputed = {path for package in packages for path in package.clobbered}
    owners = {name: package.name for package in packages for name in disputed & package.names}
    groups = [{package.name, owners.get(path, "")} for package in packages for path in package.clobbered]
    while left := next((group for group in groups if group & kept.keys() and not group <= kept.keys()), None):
        for name in left:
            kept.pop(name, None)
    return list(kept.values())


def check_winners(packages: Sequence[Linked], order: Callable[[], Sequence[str]]) -> None:
    """Whether each path that several of them bring is where the installer puts it when it makes all of them at once: with the one
    that `order` names last. Raises NotAlike."""
    disputed = {path for package in packages for path in package.clobbered}
    if not disputed:
        return
    places = {name: place for place, name in enumerate(order())}
    winners = {path: places[package.name] for package in packages for path in disputed & package.names}
    for package in packages:
        if lost := [path for path in package.clobbered if winners.get(path, -1) < places[package.name]]:
            raise NotAlike(lost[0])


def _shared(package: Linked, byte_code: Path) -> Iterator[str]:
    """Files that are the same in every prefix."""
    yield from package.names - set(package.rewritten)
    if package.name != PYTHON:
        yield meta_name(package.filename)
    index = byte_code / package.key / INDEX
    yield from orjson.loads(index.read_bytes()) if index.is_file() else ()


@contextmanager
def _linking(part: Manifest, source: Source, target: Path) -> Iterator[None]:
    folders: Folders = defaultdict(dict)
    for name, entry in part.files.items():
        folder, _, base = name.rpartition("/")
        folders[folder][base] = entry[:2]
    for name in part.links:
        folder, _, base = name.rpartition("/")
        folders[folder][base] = None
    places = {"source": str(source.prefix), "target": str(target)}
    with ExitStack() as stack:
        started = [
            stack.enter_context(_start(places | {"folders": share}, source.lock_fd)) for share in _shares(folders)
        ]
        yield
        answers = [(process.communicate()[0], process.returncode) for process in started]
    for answer, status in answers:
        _check(answer, status)


def _shares(folders: Folders) -> list[Folders]:
    """One for each core, of as many files; neighbours together, because two processes in one folder wait for each other."""
    shares: list[Folders] = [{} for _ in range(os.cpu_count() or 1)]
    files, dealt = sum(map(len, folders.values())), 0
    for name in sorted(folders):
        shares[dealt * len(shares) // files][name] = folders[name]
        dealt += len(folders[name])
    return [share for share in shares if share]


def _start(question: dict[str, Any], lock_fd: int) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as asked:
        asked.write(orjson.dumps(question))
        asked.seek(0)
        return subprocess.Popen(
            [sys.executable, "-I", "-S", PROCESS],
            stdin=asked,
            stdout=subprocess.PIPE,
            pass_fds=(lock_fd,),
            umask=READABLE_UMASK,
        )


def _check(answer: bytes, status: int) -> None:
    said = orjson.loads(answer) if status == 0 else {"changed": f"its process ended with {status}"}
    if "errno" in said:
        raise OSError(said["errno"], said["message"], said["file"])
    if "changed" in said:
        raise NotAlike(said["changed"])


def _write_anew(name: str, sha256: str, places: tuple[Path, Path]) -> list[Any]:
    """Its entry in the manifest. Both prefixes are equally long, so that this is what the installer writes, in texts as in
    binaries."""
    source, target = places
    old, new = source / name, target / name
    contents, status = old.read_bytes(), old.lstat()
    through_link = new.parent.resolve() != (target.resolve() / name).parent
    if through_link or hashlib.sha256(contents).hexdigest() != sha256 or len(bytes(source)) != len(bytes(target)):
        raise NotAlike(name)
    contents = contents.replace(bytes(source), bytes(target))
    new.parent.mkdir(parents=True, exist_ok=True)
    with new.open("xb") as file:
        file.write(contents)
        os.fchmod(file.fileno(), status.st_mode & 0o777)
    os.utime(new, ns=(status.st_mtime_ns, status.st_mtime_ns))  # byte code names the time of its source
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(contents).hexdigest()]
