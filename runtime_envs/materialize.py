"""Makes environments on one node: lock → immutable prefix, once, whoever asks and whatever gets killed meanwhile.

`<root>/envs/<fingerprint>/` holds `prefix/`, `lock.json`, `manifest.json.gz` and, written last, `READY`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime_envs.adopt import adopt, fold
from runtime_envs.bundles.on_node import Fetch, fetch_bundled, index_on, no_storage
from runtime_envs.errors import BUILD_FAILED, DAMAGED, DISK_FULL, EnvironmentProblem
from runtime_envs.fingerprint import FINGERPRINT, identity
from runtime_envs.flock import held
from runtime_envs.host import HostBase, load_host_base, make_prefix, python_of, site_packages
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.lock import Lock, LockedPackage, check_base, read_lock
from runtime_envs.uv import READABLE_UMASK, run_uv
from runtime_envs.verify import MANIFEST, PREFIX, READY, build_manifest, is_ready, packed, quick_verify, walk

LOCK_TIMEOUT_S = 1800.0
COMPILE_TIMEOUT_S = 900.0
LOCK = "lock.json"
STAGED = "wheels"
BAD_WHEEL = ("The wheel is invalid", "must not use the reserved name", "unacceptable filename")
"""uv's words."""
NO_SPACE = os.strerror(errno.ENOSPC)


@dataclass(frozen=True)
class Prepared:
    """An environment that is ready. `python` is the interpreter of the prefix. `stages`: seconds that each took, in order."""

    fingerprint: str
    prefix: Path
    python: Path
    stages: Mapping[str, float] = field(default_factory=dict, compare=False)


@dataclass
class Stopwatch:
    """Seconds by stage."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - started


class HostEnvironments:
    """The environments of base `host` under `root`. Without `index` and `base`: this machine's pip settings and this
    platform."""

    def __init__(
        self, root: Path, index: PipIndex | None = None, base: HostBase | None = None, fetch: Fetch = no_storage
    ) -> None:
        self._root = root.absolute()
        self._index = index
        self._base = base
        self._fetch = fetch

    def path(self, fingerprint: str) -> Path:
        """The folder of this environment, whether it is there or not."""
        return environment_folder(self._root, fingerprint)

    def ready(self) -> frozenset[str]:
        folder = self._root / "envs"
        homes = folder.iterdir() if folder.is_dir() else ()
        return frozenset(home.name for home in homes if FINGERPRINT.fullmatch(home.name) and is_ready(home))

    def materialize(self, lock: dict[str, Any]) -> Prepared:
        """Makes the prefix of this lock, or finds it; blocks for the install (seconds to minutes). Raises
        EnvironmentProblem: `environment_base_changed`, `environment_build_failed`, `environment_damaged`."""
        parsed, fingerprint, watch = read_lock(lock), identity(lock), Stopwatch()
        base = self._base or load_host_base()
        check_base(parsed, base)
        home = self.path(fingerprint)
        try:
            with caches_kept(self._root), held(lock_file(self._root, fingerprint), LOCK_TIMEOUT_S) as lock_fd:
                if not is_ready(home):
                    self._build(_Site(parsed, base, home, lock_fd, watch))
                os.utime(home / READY)  # it is used now: without the lock it could go before
        except TimeoutError:
            raise build_failed(f"another process has been building it for {LOCK_TIMEOUT_S:.0f} s") from None
        except OSError as error:
            raise build_failed(f"{error.strerror or error} ({error.filename or home})") from error
        return looked_at(home, fingerprint, watch)

    def _build(self, site: _Site) -> None:
        lock, home, watch = site.lock, site.home, site.watch
        if home.exists():  # somebody was killed while building it
            shutil.rmtree(home)
        prefix = home / PREFIX
        prefix.mkdir(parents=True)
        home.parent.chmod(0o755)
        with watch.stage("prefix"):
            make_prefix(prefix, site.base)
        if lock.pip:
            with watch.stage("pip"):
                fetch_bundled(lock, home, self._fetch)
                index = index_on(home, lock, self._index or machine_index())
                staged = install_wheels(lock.pip, prefix, WheelPlaces(index, self._root / "uv-cache", site.lock_fd))
            with watch.stage("byte_code"):
                _compile(staged, site.lock_fd)
            adopt(staged, prefix)
        with watch.stage("manifest"):
            make_readable(home)
            write_durably(home / LOCK, lock.model_dump_json())
            write_durably(home / MANIFEST, packed(json.dumps(build_manifest(prefix)).encode()))
        write_durably(home / READY, "")


@dataclass(frozen=True)
class _Site:
    """Of one build."""

    lock: Lock
    base: HostBase
    home: Path
    lock_fd: int
    watch: Stopwatch


@dataclass(frozen=True)
class WheelPlaces:
    """`cache` must lie on the filesystem of the prefixes: files are hard links into it."""

    index: PipIndex
    cache: Path
    lock_fd: int


def install_wheels(packages: Sequence[LockedPackage], prefix: Path, places: WheelPlaces) -> Path:
    """The folder beside the prefix that holds what `adopt` moves into it. uv asks the prefix's Python who it is: nothing of a
    tenant may be in the prefix yet."""
    staged = prefix.with_name(STAGED)
    pins = [f"{package.name}=={package.version} --hash=sha256:{package.sha256}" for package in packages]
    with tempfile.TemporaryDirectory(prefix="install-", dir=prefix.parent) as folder:
        scratch = Path(folder)
        (scratch / "requirements.txt").write_text("\n".join([*places.index.lines(), *pins]) + "\n", encoding="utf-8")
        result = run_uv(
            ["pip", "install", "--requirement", "requirements.txt", "--require-hashes", "--no-deps", "--no-build",
             "--python", str(python_of(prefix)), "--prefix", str(staged),
             "--link-mode", "hardlink", "--cache-dir", str(places.cache)],
            places.index, scratch=scratch, keep_fd=places.lock_fd,
        )  # fmt: skip
    if result.returncode != 0:
        raise _install_failed(result.message[:3000])
    fold(staged, prefix)
    return staged


def _install_failed(reason: str) -> EnvironmentProblem:
    if any(words in reason for words in BAD_WHEEL):
        return EnvironmentProblem(
            BUILD_FAILED, f"A pip package brings what no package may: {reason}",
            hint="Leave out this package or what needs it, or choose another version.",
        )  # fmt: skip
    return build_failed(reason)


def looked_at(home: Path, fingerprint: str, watch: Stopwatch) -> Prepared:
    """One that was there is checked by sizes and times. Raises EnvironmentProblem (`environment_damaged`)."""
    if "manifest" not in watch.stages:
        with watch.stage("verify"):
            damaged = quick_verify(home)
        if damaged:
            raise damaged_problem(home, damaged)
    return Prepared(fingerprint, home / PREFIX, python_of(home / PREFIX), watch.stages)


def environment_folder(root: Path, fingerprint: str) -> Path:
    if not FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(f"not a fingerprint: {fingerprint!r}")
    return root / "envs" / fingerprint


def lock_file(root: Path, fingerprint: str) -> Path:
    """Held by whoever builds, repairs or removes this environment."""
    return root / "locks" / f"{fingerprint}.lock"


def caches_lock(root: Path) -> Path:
    """Held by many who build, or by one who removes from the caches."""
    return root / "locks" / "caches.lock"


def caches_kept(root: Path) -> contextlib.AbstractContextManager[int]:
    """While somebody builds or repairs, nothing is removed from the caches."""
    return held(caches_lock(root), LOCK_TIMEOUT_S, shared=True)


def _compile(staged: Path, lock_fd: int) -> None:
    """Byte code beforehand: the first import then costs a third. Made by the platform's interpreter without `site`: the
    prefix's own would run the tenant's .pth files outside of the sandbox. A file that does not compile is no failure.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [sys.executable, "-I", "-S", "-m", "compileall", "-q", "-q", str(site_packages(staged))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=COMPILE_TIMEOUT_S,
            pass_fds=(lock_fd,),
            umask=READABLE_UMASK,
        )


def make_readable(folder: Path) -> None:
    """Every file 0644 or 0755, every folder 0755: other uids (the tenants') read them, only we write."""
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o755)
    for path in walk(folder):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(0o755 if mode & stat.S_IXUSR else 0o644)


def write_durably(path: Path, contents: str | bytes) -> None:
    with path.open("wb") as file:
        file.write(contents.encode() if isinstance(contents, str) else contents)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def build_failed(reason: str) -> EnvironmentProblem:
    if NO_SPACE in reason:
        return EnvironmentProblem(
            DISK_FULL, f"The node's disk is full: {reason}",
            hint="Free space under the data folder, or set `environments.disk_gb`; then retry the job.",
            fixable_by="operator",
        )  # fmt: skip
    return EnvironmentProblem(
        BUILD_FAILED, f"The environment could not be made on this node: {reason}",
        hint="Check the node's disk and its package index, then retry the job.", fixable_by="operator",
    )  # fmt: skip


PUT_BACK = "`heliostat env repair NAME` puts them back; what a job uses, when that has ended."


def damaged_problem(home: Path, names: list[str], hint: str = PUT_BACK) -> EnvironmentProblem:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return EnvironmentProblem(
        DAMAGED, f"Files of environment {home.name} changed since it was built: {', '.join(names[:3])}{more}.",
        hint=hint, fixable_by="operator",
    )  # fmt: skip
