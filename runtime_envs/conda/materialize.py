"""Makes conda environments on one node: lock → immutable prefix with an interpreter of its own, once, whoever asks and whatever
gets killed meanwhile. Package cache, byte code and prefixes lie under one root, and share their files by hard links."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from runtime_envs.adopt import META, adopt
from runtime_envs.bundles.on_node import Fetch, fetch_bundled, index_on, no_storage, pixi_on
from runtime_envs.conda.bytecode import Compiler, Hashes, byte_code_name, compile_files, link_byte_code
from runtime_envs.conda.clone import PYTHON, NotAlike, Source, check_winners, nearest, pairs, read_source
from runtime_envs.conda.engine import Engine
from runtime_envs.conda.fetch import DOWNLOADS, fetch_packages
from runtime_envs.conda.lock import CondaLock, read_conda_lock
from runtime_envs.conda.manifest import Manifest, describe
from runtime_envs.conda.prefix import Linked, forget_prefix, read_prefix
from runtime_envs.errors import BUILD_FAILED, EnvironmentProblem
from runtime_envs.fingerprint import identity
from runtime_envs.flock import held
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.materialize import (
    LOCK,
    LOCK_TIMEOUT_S,
    Prepared,
    Stopwatch,
    WheelPlaces,
    build_failed,
    caches_kept,
    environment_folder,
    install_wheels,
    lock_file,
    looked_at,
    write_durably,
)
from runtime_envs.verify import MANIFEST, PREFIX, READY, is_ready, names_in, packed, sha256_of

PIXI_LOCK = "pixi.lock"
TELL_EVERY_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Site:
    """Of one build."""

    lock: CondaLock
    home: Path
    lock_fd: int
    watch: Stopwatch

    @property
    def prefix(self) -> Path:
        return self.home / PREFIX


class CondaEnvironments:
    """The environments over conda bases under `root`."""

    def __init__(self, root: Path, index: PipIndex | None = None, fetch: Fetch = no_storage) -> None:
        self._root = root.absolute()
        self._index = index
        self._fetch = fetch

    @property
    def packages(self) -> Path:
        """The package cache."""
        return self._root / "pkgs"

    @property
    def byte_code(self) -> Path:
        return self._root / "bytecode"

    def materialize(self, lock: dict[str, Any], *, like_others: bool = True) -> Prepared:
        """Makes the prefix of this lock, or finds it; blocks for seconds to minutes. Without `like_others` from its packages, even
        where another environment has most of them. Raises EnvironmentProblem:
        `environment_build_failed`, `environment_channel_failed`, `environment_disk_full`, `environment_damaged`."""
        parsed, fingerprint = read_conda_lock(lock), identity(lock)
        home, watch = environment_folder(self._root, fingerprint), Stopwatch()
        try:
            with caches_kept(self._root), held(lock_file(self._root, fingerprint), LOCK_TIMEOUT_S) as lock_fd:
                if not is_ready(home):
                    self._build(_Site(parsed, home, lock_fd, watch), lock, like_others=like_others)
                os.utime(home / READY)  # it is used now: without the lock it could go before
        except TimeoutError:
            raise build_failed(f"another process has been building it for {LOCK_TIMEOUT_S:.0f} s") from None
        except subprocess.CalledProcessError as error:
            raise build_failed(error.stderr.strip()) from error
        except OSError as error:
            raise build_failed(f"{error.strerror or error} ({error.filename or home})") from error
        return looked_at(home, fingerprint, watch)

    def _build(self, site: _Site, lock: dict[str, Any], *, like_others: bool) -> None:
        """`like_others`: from the environment here that is most like it, where there is one."""
        with nearest(self._root, site.lock) if like_others else nullcontext() as home:
            try:
                self._start_and_fill(site, home)
            except (NotAlike, OSError, KeyError, ValueError) as error:
                if home is None:
                    raise
                log.warning("%s is made from its packages, not from %s: %r", site.home.name, home.name, error)
                self._start_and_fill(site, None)
        write_durably(site.home / LOCK, orjson.dumps(lock).decode())
        write_durably(site.home / READY, "")

    def _start_and_fill(self, site: _Site, like: Path | None) -> None:
        """The installer loads while we clear and clone; nearly always there is something for it."""
        with Engine(keep_fd=site.lock_fd) as engine:
            self._fill(site, like, engine)

    def _fill(self, site: _Site, like: Path | None, engine: Engine) -> None:
        """The prefix and its manifest. What the installer links comes before most of what is cloned: it would write into files
        that are shared; what wheels bring comes last, when nobody else writes or reads what the prefix says of itself. Raises
        NotAlike, OSError, EnvironmentProblem."""
        self._clear(site)
        source: Source | None = None
        staged: Path | None = None
        taken = Manifest({}, {})
        if like:
            with site.watch.stage("clone"):
                source = read_source(like, self._byte_code(site), site.lock, site.lock_fd)
                taken = source.put([PYTHON], site.prefix)
        elif site.lock.pip:
            self._install(site, engine, [PYTHON])
        if site.lock.pip:
            with site.watch.stage("pip"):
                index = index_on(site.home, site.lock, self._index or machine_index())
                places = WheelPlaces(index, self._root / "uv-cache", site.lock_fd)
                staged = install_wheels(site.lock.pip, site.prefix, places)
        kept = source.packages if source else {}
        if others := [package.name for package in site.lock.conda if package.name not in kept]:
            self._install(site, engine, [PYTHON, *others])
        own = [package for package in _read(site, kept) if package.name not in kept]
        packages = [*own, *kept.values()]
        _check_interpreter(site, packages, taken)
        if source:
            check_winners(packages, lambda: _order(site, engine))
        with site.watch.stage("byte_code"):
            hashes = self._compile(site, packages, own, staged)
        with self._cloning(site, source) as rest, site.watch.stage("manifest"):
            described = _describe(site, own, hashes, taken)
        with site.watch.stage("manifest"):
            wheels = describe(site.prefix, adopt(staged, site.prefix) if staged else (), {})
            write_durably(site.home / MANIFEST, packed(orjson.dumps(described | taken | rest | wheels)))

    @contextmanager
    def _cloning(self, site: _Site, source: Source | None) -> Iterator[Manifest]:
        """Links what is left while the body runs. Not beside byte code: `cp` stumbles over a folder that another makes first."""
        if source is None:
            yield Manifest({}, {})
            return
        with site.watch.stage("clone"), source.putting(source.packages.keys() - {PYTHON}, site.prefix) as part:
            yield part

    def _clear(self, site: _Site) -> None:
        if site.home.exists():  # somebody was killed while building it
            shutil.rmtree(site.home)
        site.prefix.mkdir(parents=True)
        self._check_one_filesystem(site.home)
        site.home.parent.chmod(0o755)
        fetch_bundled(site.lock, site.home, self._fetch)
        write_durably(site.home / PIXI_LOCK, pixi_on(site.home, site.lock))

    def _install(self, site: _Site, engine: Engine, only: Sequence[str]) -> None:
        """`download` is what it took until the last package was fetched; some are linked before that."""
        started = fetched = told = time.monotonic()

        def note(said: dict[str, Any]) -> None:
            nonlocal fetched
            if said["stage"] == "download":
                fetched = time.monotonic()

        def tell(said: dict[str, Any]) -> None:
            nonlocal told
            if time.monotonic() - told >= TELL_EVERY_S:
                told = time.monotonic()
                log.info("%s: %d of %d MB fetched", site.home.name, said["bytes"] // 10**6, said["total"] // 10**6)

        fetch_packages(site.lock, only, self._root, tell, site.lock_fd)
        fetched = time.monotonic()
        question = {"task": "install", "lock": str(site.home / PIXI_LOCK), "prefix": str(site.prefix)}
        engine.ask(question | {"cache": str(self.packages), "only": list(only)}, note)
        stages = site.watch.stages
        stages["download"] = stages.get("download", 0.0) + fetched - started
        stages["link"] = stages.get("link", 0.0) + time.monotonic() - fetched

    def _compile(self, site: _Site, packages: Sequence[Linked], own: Sequence[Linked], staged: Path | None) -> Hashes:
        """Of `own`: what is cloned has its byte code. And of wheels, before they come where a package's links may lie."""
        python = next(package for package in packages if package.name == "python")
        interpreter = python.cached / "bin" / f"python{site.lock.minor}"
        compiler = Compiler(interpreter, self._byte_code(site), site.lock_fd)
        hashes = link_byte_code(site.prefix, own, compiler)
        if staged:
            sources = [name for name in names_in(staged / "lib") if name.endswith(".py")]
            lib = staged / "lib"
            compile_files([(lib / name, lib / byte_code_name(name, compiler.tag)) for name in sources], compiler)
        return hashes

    def _byte_code(self, site: _Site) -> Path:
        return self.byte_code / site.lock.minor

    def _check_one_filesystem(self, home: Path) -> None:
        """Else every environment would be a whole copy. A link is tried: two mounts of one disk have one device number."""
        probe = home / "probe"
        probe.touch()
        for folder in (self.packages, self.byte_code, self._root / DOWNLOADS, self._root / "uv-cache"):
            folder.mkdir(parents=True, exist_ok=True)
            linked = folder / f".probe-{home.name}"
            linked.unlink(missing_ok=True)  # of one who was killed here
            try:
                linked.hardlink_to(probe)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                raise EnvironmentProblem(
                    BUILD_FAILED, f"{folder} and {home.parent} lie on two filesystems; files cannot be shared.",
                    hint="Put the whole data folder of the node on one mount.", fixable_by="operator",
                ) from None  # fmt: skip
            linked.unlink()
        probe.unlink()


def _read(site: _Site, cloned_later: Collection[str]) -> list[Linked]:
    there = [package for package in site.lock.conda if package.name == PYTHON or package.name not in cloned_later]
    try:
        return read_prefix(site.home, pairs(there))
    except (ValueError, KeyError) as error:
        raise _writes_over(f"what the installer says of it ({error})") from None


def _writes_over(what: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        BUILD_FAILED, f"A package of this environment writes over {what}.",
        hint="Leave out the package that brings this file.",
    )  # fmt: skip


def _order(site: _Site, engine: Engine) -> list[str]:
    names: list[str] = engine.ask({"task": "order", "lock": str(site.home / PIXI_LOCK)})["names"]
    return names


def _check_interpreter(site: _Site, packages: Sequence[Linked], taken: Manifest) -> None:
    """A tenant's package can bring any file."""
    name = f"bin/python{site.lock.minor}"
    python = next(package for package in packages if package.name == PYTHON)
    file = python.files.get(name)  # the installer moves a file aside that another package brings too
    expected = taken.files[name][2] if name in taken.files else file and file.sha256
    if file is None or sha256_of(site.prefix / name) != expected:
        raise _writes_over(f"the environment's own Python ({name})")


def _describe(site: _Site, own: Sequence[Linked], byte_code: Hashes, taken: Manifest) -> Manifest:
    """All but `taken`, what is cloned."""
    known = {name: file.sha256 for p in own for name, file in p.files.items() if file.sha256} | byte_code
    for package in own:
        forget_prefix(site.prefix, package)
    (site.prefix / META / "history").touch()
    (site.prefix / "CACHEDIR.TAG").unlink(missing_ok=True)  # the installer's word to backups
    names = {name for package in own for name in package.names} | known.keys() | set(_installers(site.prefix))
    names -= taken.files.keys()
    return describe(site.prefix, names, known)


def _installers(prefix: Path) -> Iterator[str]:
    """Files of the installer's own."""
    for folder in (prefix, prefix / META):
        yield from (path.relative_to(prefix).as_posix() for path in folder.iterdir() if path.is_file())
