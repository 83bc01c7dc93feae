"""Environments of both kinds behind one door: what the service solves with, and what a node keeps."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime_envs.adopt import META
from runtime_envs.budget import Budget, free_bytes, keep, remove
from runtime_envs.bundles.on_node import Fetch, no_storage
from runtime_envs.conda.bases import conda_bases
from runtime_envs.conda.lock import is_conda
from runtime_envs.conda.materialize import CondaEnvironments
from runtime_envs.conda.repair import Repaired, Site, repair_files
from runtime_envs.conda.solve import CondaPlaces, solve_conda
from runtime_envs.errors import CHECK_FAILED, DAMAGED, DISK_FULL, NOT_READY, EnvironmentProblem
from runtime_envs.flock import held
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.lock import Solved, solve
from runtime_envs.materialize import (
    LOCK,
    LOCK_TIMEOUT_S,
    HostEnvironments,
    Prepared,
    build_failed,
    caches_kept,
    damaged_problem,
    lock_file,
)
from runtime_envs.spec import parse_spec
from runtime_envs.usage import in_use
from runtime_envs.uv import run_uv
from runtime_envs.verify import MANIFEST, PREFIX, full_verify, is_ready, quick_verify, set_times
from runtime_envs.window import check_window

log = logging.getLogger(__name__)


def solve_environment(text: str, places: CondaPlaces) -> Solved:
    """environment.yml → lock; seconds, blocking. Raises EnvironmentProblem; what it says of a line names that line."""
    spec = parse_spec(text)
    check_window(spec)
    places.policy.check_spec(spec)
    solved = solve_conda(spec, places) if spec.base in conda_bases() else solve(text, index=places.index)
    places.policy.check_lock(solved.lock, solved.sizes)
    return solved


class Environments:
    """Of one node, under `root`. Without `index`: this machine's pip settings. Without `budget`: they may fill the disk. `fetch`:
    what came with bundles."""

    def __init__(
        self, root: Path, index: PipIndex | None = None, budget: Budget | None = None, fetch: Fetch = no_storage
    ) -> None:
        self._root = root.absolute()
        self._index = index
        self._budget = budget
        self._repairing = threading.Lock()
        self._host = HostEnvironments(root, index, fetch=fetch)
        self._conda = CondaEnvironments(root, index, fetch)

    def path(self, fingerprint: str) -> Path:
        return self._host.path(fingerprint)

    def ready(self) -> frozenset[str]:
        return self._host.ready()

    def materialize(self, lock: dict[str, Any]) -> Prepared:
        """Raises EnvironmentProblem, as the two kinds do. On a full disk what is not used goes, and it is tried once more; a
        new environment may push out old ones."""
        try:
            made = self._make(lock)
        except EnvironmentProblem as problem:
            if problem.code != DISK_FULL:
                raise
            before = free_bytes(self._root)
            keep(self._root, Budget(0))
            if free_bytes(self._root) <= before:
                raise
            made = self._make(lock)
        if self._budget and "manifest" in made.stages:
            try:
                keep(self._root, self._budget, spare={made.fingerprint})
            except (OSError, subprocess.SubprocessError):  # what was asked for is there
                log.exception("the environments of this node may take more of the disk than they shall")
        return made

    def _make(self, lock: dict[str, Any], *, like_others: bool = True) -> Prepared:
        if is_conda(lock):
            return self._conda.materialize(lock, like_others=like_others)
        return self._host.materialize(lock)

    def verify(self, fingerprint: str, *, full: bool) -> list[str]:
        """The files that are not as they were made. Raises EnvironmentProblem: `environment_not_ready`, and when all shall be read
        `environment_check_failed`."""
        home = self.path(fingerprint)
        if not is_ready(home):
            raise EnvironmentProblem(
                NOT_READY, f"Environment {fingerprint} is not on this node.",
                hint="It is made when a job needs it.", fixable_by="operator",
            )  # fmt: skip
        try:
            return full_verify(home) if full else quick_verify(home)
        except (OSError, subprocess.CalledProcessError) as error:
            raise _check_failed(fingerprint, error) from error

    def repair(self, fingerprint: str) -> Repaired:
        """Checks all contents and puts back what changed; where that cannot be done file by file the environment is made
        again, unless a job uses it. So are others that share a file that changed. Raises EnvironmentProblem: as `verify`,
        `environment_damaged`, and what `materialize` raises."""
        with self._repairing:  # one writes into environments that another looks at
            try:
                return self._repair(fingerprint)
            except (OSError, subprocess.CalledProcessError) as error:
                raise build_failed(f"it cannot be repaired: {error}") from error

    def _repair(self, fingerprint: str) -> Repaired:
        home = self.path(fingerprint)
        damaged = self.verify(fingerprint, full=True)
        touched = set_times(home, spare=damaged)
        if not damaged:
            return Repaired(tuple(touched), (fingerprint,) if touched else (), ())
        try:
            lock: dict[str, Any] = json.loads((home / LOCK).read_bytes())
            lock["pip"]  # every lock has it
        except (OSError, ValueError, LookupError, TypeError) as error:
            # nothing here knows any more what it is made of; a job brings its lock
            self._remove(fingerprint, damaged)
            raise damaged_problem(
                home, [LOCK, *damaged], "It was removed; it is made again when a job needs it."
            ) from error
        was = _inodes(home, damaged)
        told_wrong = any(name == MANIFEST or name.startswith(f"{META}/") for name in damaged)  # what would be put back
        done = self._file_by_file(home, damaged) if is_conda(lock) and not told_wrong else None
        if done is None or done.left:
            self._again(fingerprint, lock, damaged)
            if is_conda(lock) and (cached := self.verify(fingerprint, full=True)):
                self._file_by_file(home, cached)  # what it was made from is damaged too
        now = _inodes(home, damaged)
        bad = {name: inode for name, inode in was.items() if now.get(name) != inode}
        hit = {*(done.environments if done else ()), fingerprint, *self._others_again(bad)}
        return Repaired(tuple(sorted([*damaged, *touched])), tuple(sorted(hit)), ())

    def _file_by_file(self, home: Path, damaged: Sequence[str]) -> Repaired | None:
        """None: what says which package a file is of cannot be read."""
        with caches_kept(self._root), held(lock_file(self._root, home.name), LOCK_TIMEOUT_S) as lock_fd:
            try:
                return repair_files(Site(self._root, home, lock_fd), damaged)
            except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
                log.warning("%s is made again: its conda-meta cannot be read: %r", home.name, error)
                return None

    def _others_again(self, bad: Mapping[str, tuple[int, int]]) -> list[str]:
        """The environments that still hold one of these files under the same name, as wheels and `conda-meta` are shared."""
        made = []
        for home in (self.path(fingerprint) for fingerprint in self.ready()):
            if held_still := [name for name, inode in _inodes(home, bad).items() if bad[name] == inode]:
                try:
                    self._again(home.name, json.loads((home / LOCK).read_bytes()), held_still, keep_wheels=True)
                    made.append(home.name)
                except (EnvironmentProblem, OSError, ValueError) as error:  # its own next check finds it again
                    log.warning("%s shares damaged files (%s) and is left: %s", home.name, held_still[0], error)
        return made

    def _again(
        self, fingerprint: str, lock: dict[str, Any], damaged: Sequence[str], *, keep_wheels: bool = False
    ) -> None:
        """Without `keep_wheels` from wheels that are fetched again: the damaged file may be theirs too."""
        if lock["pip"] and not keep_wheels and fingerprint not in in_use(self._root):
            names = [package["name"] for package in lock["pip"]]
            cache = ["--cache-dir", str(self._root / "uv-cache")]
            with tempfile.TemporaryDirectory() as scratch:
                run_uv(["cache", "clean", *names, *cache], self._index or machine_index(), scratch=Path(scratch))
        self._remove(fingerprint, damaged)
        self._make(lock, like_others=False)  # they may share what is damaged

    def _remove(self, fingerprint: str, damaged: Sequence[str]) -> None:
        if not remove(self._root, fingerprint, lambda: fingerprint not in in_use(self._root)):
            raise EnvironmentProblem(
                DAMAGED, f"Environment {fingerprint} is damaged ({', '.join(damaged[:3])}) and is being used.",
                hint="Repair it when the jobs that use it have ended.", fixable_by="operator",
            )  # fmt: skip


def _inodes(home: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    found = {}
    for name in names:
        with suppress(OSError):
            status = (home / PREFIX / name).lstat()
            found[name] = (status.st_dev, status.st_ino)
    return found


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time ones have none
        return f"signal {number}"


def _check_failed(fingerprint: str, error: OSError | subprocess.CalledProcessError) -> EnvironmentProblem:
    reason = str(error)
    if isinstance(error, subprocess.CalledProcessError):  # its own words name the command, not what it was for
        code = error.returncode
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        reason = f"a process that reads its files {how}"
    return EnvironmentProblem(
        CHECK_FAILED, f"Environment {fingerprint} could not be checked on this node: {reason}.",
        hint="Nothing was changed; check it again. Where it happens again: the node's memory, and the log of its agent.",
        fixable_by="operator",
    )  # fmt: skip
