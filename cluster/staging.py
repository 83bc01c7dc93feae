"""What jobs read from the node's disk: base models, once a node, and the files of one attempt."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath

from filelock import FileLock

from cluster.errors import Conflict, Unavailable
from cluster.storage.objects import ObjectStore, folder_sha256

MANIFEST = "manifest.json"
"""Under a model's prefix: {file: sha256}."""

READY = "READY"
CACHES = "caches"
SPARE_SHARE = 0.2
"""Of the disk: what models that no job asked for leave free."""
_FORGET_AFTER_S = 3600.0
_FORGET_CACHES_AFTER_S = 7 * 24 * 3600.0


class Staging:
    """Below `root`: `models/<sha256>/`, `jobs/<job>/a<attempt>/`; files are 0644 in 0755: a tenant's uid reads them. What its
    trainings keep in `caches/<tenant>/` is its own."""

    def __init__(self, root: Path, objects: ObjectStore) -> None:
        self._root = root
        self._objects = objects

    def models(self) -> frozenset[str]:
        """Hashes of the models that are complete here."""
        return frozenset(ready.parent.name for ready in (self._root / "models").glob(f"*/{READY}"))

    def stage_model(self, prefix: str, sha256: str, files: dict[str, str] | None = None) -> Path:
        """The model's folder, copied and checked once. `files` (name → sha256) or else the manifest under `prefix`;
        `sha256` is that of the folder. Raises `NotFound`, `Conflict` (`object_damaged`)."""
        folder = self._root / "models" / _plain(sha256)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    self._copy_model(prefix, sha256, folder, files or self._manifest(prefix))
                except BaseException:  # half of it would only take room
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        return folder

    def stage_ahead(self, prefix: str, sha256: str, bytes: int) -> None:
        """Leaves room for what jobs bring. Raises as `stage_model`, and `Unavailable` (`node_disk_full`)."""
        self._root.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self._root)
        if sha256 not in self.models() and disk.free - bytes < disk.total * SPARE_SHARE:
            raise Unavailable(
                f"a base model of {bytes / 1e9:.1f} GB would leave less than {SPARE_SHARE:.0%} of the node's disk free",
                code="node_disk_full",
                hint="Give the node more disk, or name fewer models in training.stage_base_models.",
            )
        self.stage_model(prefix, sha256)

    def _manifest(self, prefix: str) -> dict[str, str]:
        manifest: dict[str, str] = json.loads(self._objects.read_bytes(f"{prefix}/{MANIFEST}"))
        return manifest

    def _copy_model(self, prefix: str, sha256: str, folder: Path, files: dict[str, str]) -> None:
        if folder_sha256(files) != sha256:
            raise Conflict(
                f"the files listed under {prefix} are not those of model {sha256[:12]}…",
                code="object_damaged",
                hint="Register the base model again.",
                fixable_by="operator",
            )
        _make_folder(folder)
        for name, file_sha256 in files.items():
            self._fetch(f"{prefix}/{name}", folder, name, file_sha256)
        (folder / READY).write_text(json.dumps({name: (folder / name).stat().st_size for name in files}))

    def stage_attempt(
        self, job_id: str, attempt: int, files: dict[str, tuple[str, str]], *, ahead: bool = False
    ) -> Path:
        """The scratch folder of an attempt with its files (name → (key, sha256)); those of older attempts go. `ahead`: it was
        not granted yet, and is marked so. Raises `NotFound`, `Conflict` (`object_damaged`), `Unavailable` when the attempt was
        ended meanwhile."""
        self._forget_ended_jobs()
        scratch = self._scratch(job_id, attempt)
        with _locked(scratch.parent / "lock"):
            if ahead and scratch.is_dir() and not _ahead(scratch).exists():
                return scratch  # granted while this call was on its way
            if ahead:
                _ahead(scratch).touch()
            else:
                _ahead(scratch).unlink(missing_ok=True)
            _ended(scratch).unlink(missing_ok=True)
            for older in scratch.parent.glob("a*"):
                if older.name.removeprefix("a").isdecimal() and int(older.name[1:]) < attempt:
                    shutil.rmtree(older)
            _make_folder(scratch)
            for name, (key, sha256) in files.items():
                self._fetch(key, scratch, name, sha256)
            if _ended(scratch).exists():
                shutil.rmtree(scratch, ignore_errors=True)
                raise Unavailable(f"attempt {attempt} of job {job_id} was ended while its files came", code="ended")
        return scratch

    def clear_attempt(self, job_id: str, attempt: int) -> None:
        """The job's own folder stays for a while: it says that the job ran here. Who stages at this moment clears up
        himself: he is not waited for."""
        scratch = self._scratch(job_id, attempt)
        if scratch.parent.is_dir():
            with suppress(OSError):  # a full disk
                _ended(scratch).touch()
        shutil.rmtree(scratch, ignore_errors=True)

    def clear_ahead(self, job_id: str, attempt: int) -> None:
        """Unless it was granted since."""
        scratch = self._scratch(job_id, attempt)
        if scratch.parent.is_dir():
            with _locked(scratch.parent / "lock"):
                if _ahead(scratch).exists():
                    shutil.rmtree(scratch, ignore_errors=True)
                    _ahead(scratch).unlink()

    def clear_all_ahead(self) -> None:
        """When nobody knows any more what for."""
        for mark in (self._root / "jobs").glob(f"*/{_ahead(Path('a*')).name}"):
            self.clear_ahead(mark.parent.name, int(mark.name.rpartition("-a")[2]))

    def ran_here(self, job_id: str) -> bool:
        return (self._root / "jobs" / job_id).is_dir()

    def _forget_ended_jobs(self) -> None:
        for folder in (self._root / "jobs").glob("*"):
            if not any(folder.glob("a*")) and time.time() - folder.stat().st_mtime > _FORGET_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)  # another call may be at it too
        for folder in (self._root / CACHES).glob("*"):
            if time.time() - folder.stat().st_mtime > _FORGET_CACHES_AFTER_S:  # nothing was added since
                shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, key: str, folder: Path, name: str, sha256: str) -> None:
        target = folder / _relative(name)
        if _holds(target, sha256):
            return  # it came ahead
        _make_folder(target.parent)
        self._objects.get_file(key, target, sha256)

    def _scratch(self, job_id: str, attempt: int) -> Path:
        return self._root / "jobs" / _plain(job_id) / f"a{attempt}"


def caches_of(scratch: Path) -> Path:
    """Of the node on which an attempt has this scratch folder: a folder for each tenant."""
    return scratch.parents[2] / CACHES


def _holds(file: Path, sha256: str) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as contents:
        return hashlib.file_digest(contents, "sha256").hexdigest() == sha256


def _ahead(scratch: Path) -> Path:
    """There while the attempt was not granted."""
    return scratch.with_name(f"next-{scratch.name}")


def _ended(scratch: Path) -> Path:
    return scratch.with_name(f"ended-{scratch.name}")


def _locked(path: Path) -> FileLock:
    """Over threads and processes, and gone with the process that held it."""
    _make_folder(path.parent)
    return FileLock(path)


def _is_whole(folder: Path) -> bool:
    """READY is written last, with the sizes; a file that was cut or removed since makes the copy worthless."""
    ready = folder / READY
    if not ready.is_file():
        return False
    try:
        sizes = json.loads(ready.read_text())
    except json.JSONDecodeError:  # the machine went down while it was written
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _make_folder(folder: Path) -> None:
    """0755 all the way, whatever the umask of the agent."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        made.chmod(0o755)


def _plain(name: str) -> str:
    """Raises ValueError for a name that would leave its folder."""
    if not name or "/" in name or name in (".", ".."):
        raise ValueError(f"not a plain name: {name!r}")
    return name


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"not a name below a folder: {name!r}")
    return path
