"""Puts back what changed in a conda environment, and with it in the package cache and in every environment that shares the
file: all of them are names of one inode. Files are replaced whole, so that a process that runs keeps what it has open."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from runtime_envs.conda.bytecode import INDEX, TREE, Compiler, byte_code_name, compile_files
from runtime_envs.conda.engine import ask
from runtime_envs.conda.prefix import Linked, packages_of, read_prefix
from runtime_envs.materialize import write_durably
from runtime_envs.verify import MANIFEST, PREFIX, is_ready, packed, read_manifest, sha256_of


@dataclass(frozen=True)
class Site:
    """Where the repair takes place: the environment, the node's root, and the lock that is held."""

    root: Path
    home: Path
    lock_fd: int

    @property
    def prefix(self) -> Path:
        return self.home / PREFIX


@dataclass(frozen=True)
class Repaired:
    """`files` were put back; `environments`: all in which something was, by fingerprint; `left`: what cannot be put back one
    by one, because no conda package brought it."""

    files: tuple[str, ...]
    environments: tuple[str, ...]
    left: tuple[str, ...]


def repair_files(site: Site, damaged: Sequence[str]) -> Repaired:
    """Fetches packages again only when their cached files are damaged too. Raises EnvironmentProblem
    (`environment_channel_failed`)."""
    packages = read_prefix(site.home, packages_of(site.home))
    manifest = _manifest(site.home)
    extra = [name for name in damaged if name not in manifest["files"] and name not in manifest["links"]]
    for name in extra:
        (site.prefix / name).unlink(missing_ok=True)
    owners = {name: package for package in packages for name in package.files}
    ours = {name: owners[name] for name in damaged if name in owners}
    changed = _put_back(site, ours) if ours else set()
    compiled = _byte_code_of(damaged, packages)
    for name, (package, source) in compiled.items():
        changed |= _compile_again(site, package, (name, source))
    done = {*extra, *ours, *compiled}
    left = tuple(name for name in damaged if name not in done)
    return Repaired(tuple(sorted(done)), tuple(sorted(changed | {site.home.name} if done else changed)), left)


def _manifest(home: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = orjson.loads(read_manifest(home))
    return manifest


# --- files of packages ---


def _put_back(site: Site, damaged: dict[str, Linked]) -> set[str]:
    """The fingerprints of all environments in which one of them was replaced."""
    stale = {package.name: package for name, package in damaged.items() if not _cached_is_good(name, package)}
    with tempfile.TemporaryDirectory(prefix="repair-", dir=site.root) as folder:
        fresh = Path(folder) / PREFIX
        if stale:
            _install_aside(site, list(stale), fresh, validate=True)
        changed: set[str] = set()
        for name, package in damaged.items():
            if package.name in stale:
                changed |= _replace_everywhere(site, (name, package), fresh / name)
            else:
                changed |= _replace_everywhere(site, (name, package), package.cached / package.files[name].source)
    return changed


def _cached_is_good(name: str, package: Linked) -> bool:
    file = package.files[name]
    cached = package.cached / file.source
    if file.rewritten or file.symlink:
        return False
    try:
        return sha256_of(cached) == file.sha256
    except OSError:
        return False


def _install_aside(site: Site, names: list[str], prefix: Path, *, validate: bool) -> None:
    """The packages with this environment's prefix written into their files, from a cache that is checked byte by byte: what is
    damaged there is fetched again."""
    # noarch packages are linked by the version of the Python beside them
    question = {
        "task": "install",
        "lock": str(site.home / "pixi.lock"),
        "only": [*names, "python"],
        "validate": validate,
    }
    places = {"prefix": str(prefix), "written_prefix": str(site.prefix), "cache": str(site.root / "pkgs")}
    ask(question | places, keep_fd=site.lock_fd)


def _replace_everywhere(site: Site, what: tuple[str, Linked], good: Path) -> set[str]:
    name, package = what
    if good.is_symlink() or package.files[name].rewritten:
        _replace(site.prefix / name, good)
        _keep_time(site, name)
        return {site.home.name}
    changed = set()
    for home in _sharing(site.root, package):
        target = home / PREFIX / name
        if not _same(target, good):
            _replace(target, good)
            changed.add(home.name)
    return changed


def _sharing(root: Path, package: Linked) -> Iterable[Path]:
    for home in (root / "envs").glob("*"):
        if is_ready(home) and (package.filename, package.sha256) in packages_of(home):
            yield home


def _same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _replace(target: Path, good: Path) -> None:
    """A second name for `good` in the place of `target`, in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=target.parent) as folder:
        new = Path(folder) / "new"
        if good.is_symlink():
            new.symlink_to(good.readlink())
        else:
            new.hardlink_to(good)
        new.replace(target)


def _keep_time(site: Site, name: str) -> None:
    """Of a file that is written for each prefix: the manifest knows the time of the first one."""
    entry = _manifest(site.home)["files"].get(name)
    if entry is not None:
        os.utime(site.prefix / name, ns=(entry[1], entry[1]))


# --- byte code ---


def _byte_code_of(damaged: Sequence[str], packages: Sequence[Linked]) -> dict[str, tuple[Linked, str]]:
    """Damaged byte code that was compiled on this node → package and source."""
    wanted = {name for name in damaged if name.endswith(".pyc")}
    found: dict[str, tuple[Linked, str]] = {}
    for package in packages:
        for name in package.files if wanted else ():
            target = byte_code_name(name, _tag(packages)) if name.endswith(".py") else ""
            if target in wanted and target not in package.files:
                found[target] = package, name
    return found


def _tag(packages: Sequence[Linked]) -> str:
    return f"cpython-{_minor(packages).replace('.', '')}"


def _minor(packages: Sequence[Linked]) -> str:
    python = next(package for package in packages if package.name == "python")
    name = next(name for name in python.files if name.startswith("lib/python3."))
    return name.split("/")[1].removeprefix("python")


def _compile_again(site: Site, package: Linked, what: tuple[str, str]) -> set[str]:
    """Byte code differs from run to run, so the manifests and the cache's index learn the new one."""
    name, source = what
    packages = read_prefix(site.home, packages_of(site.home))
    python = next(one for one in packages if one.name == "python")
    minor = _minor(packages)
    compiler = Compiler(python.cached / "bin" / f"python{minor}", site.root / "bytecode" / minor, site.lock_fd)
    cached = compiler.cache / package.key
    with tempfile.TemporaryDirectory(prefix="repair-", dir=site.root) as folder:
        good = Path(folder) / "new.pyc"
        compile_files([(site.prefix / source, good)], compiler)
        _replace(cached / TREE / name, good)
        digest = sha256_of(good)
        index = orjson.loads((cached / INDEX).read_bytes()) | {name: digest}
        write_durably(cached / INDEX, orjson.dumps(index).decode())
        changed = set()
        for home in _sharing(site.root, package):
            _replace(home / PREFIX / name, good)
            _learn(home, name, digest)
            changed.add(home.name)
    return changed


def _learn(home: Path, name: str, digest: str) -> None:
    manifest = _manifest(home)
    status = (home / PREFIX / name).stat()
    manifest["files"][name] = [status.st_size, status.st_mtime_ns, digest]
    with tempfile.TemporaryDirectory(prefix=".repair-", dir=home) as folder:
        new = Path(folder) / MANIFEST
        write_durably(new, packed(orjson.dumps(manifest)))
        new.replace(home / MANIFEST)
