"""What a bundle holds: the lock, the packages that the base lacks (or all), the tenant's file, and two files for stock conda.
And back: what an importing Heliostat takes from one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from runtime_envs.bundles.archive import Opened, read_archive, refused, write_archive
from runtime_envs.bundles.fetch import Places, fetch_conda, fetch_wheels
from runtime_envs.bundles.signing import SigningKey, Trust
from runtime_envs.conda.bases import conda_bases
from runtime_envs.conda.lock import CondaLock, is_conda, places_of, read_conda_lock, with_places
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.fingerprint import dependency_md5_of, identity
from runtime_envs.lock import Lock, Solved, read_lock
from runtime_envs.spec import parse_spec

LOCK, SPEC, PIXI = "lock.json", "spec.yml", "pixi.lock"


@dataclass(frozen=True)
class Imported:
    """`files`: what nodes cannot have from elsewhere, by file name."""

    solved: Solved
    spec: str
    files: dict[str, Path]
    signed_by: str


# --- out ---


def export_bundle(
    target: Path, what: tuple[str, dict[str, Any]], key: SigningKey, places: Places, *, whole: bool
) -> None:
    """`what`: environment.yml and lock. `whole`: with the packages of the base, so that no channel is needed at all. Fetches
    packages (seconds to minutes). Raises EnvironmentProblem: `environment_channel_failed`, `environment_index_failed`."""
    spec, stored = what
    lock = {name: value for name, value in stored.items() if name != "bundled"}
    with tempfile.TemporaryDirectory(prefix=".bundle-", dir=target.parent) as scratch:
        folder = Path(scratch)
        texts = {SPEC: spec, LOCK: json.dumps(lock, indent=1)}
        if is_conda(lock):
            parsed = read_conda_lock(stored)
            files = fetch_conda(parsed, folder, places, whole=whole)
            texts |= {PIXI: parsed.pixi, **_for_conda(spec, parsed, files)}
        else:
            files = {}
            texts |= _for_pip(spec, read_lock(lock))
        if lock["pip"]:
            files |= fetch_wheels(stored, folder, places)
        for name, text in texts.items():
            files[name] = folder / name
            files[name].write_text(text, encoding="utf-8")
        write_archive(target, identity(lock), files, key)


def _for_conda(spec: str, lock: CondaLock, files: Mapping[str, Path]) -> dict[str, str]:
    """Plain `environment.yml` and `explicit.txt`, for `conda env create` and `conda create --file` in the unpacked folder."""
    places = places_of(lock.pixi)
    channels = {package.name: places[package.filename][0].rsplit("/", 2)[0] for package in lock.conda}
    first = channels["python"]
    lines = [
        f"{'' if channels[package.name] == first else f'{channels[package.name]}::'}"
        f"{package.name}={package.version}={package.build}"
        for package in lock.conda
    ]
    own = [f"packages/{package.subdir}/{package.filename}" for package in lock.conda]
    explicit = [
        f"{name if name in files else places[name.rsplit('/', 1)[-1]][0]}{_md5(places[name.rsplit('/', 1)[-1]][1])}"
        for name in own
    ]
    return {
        "environment.yml": _environment(spec, list(dict.fromkeys((first, *channels.values()))), [*lines, *_pip(lock)]),
        "explicit.txt": "\n".join(["@EXPLICIT", *explicit]) + "\n",
    }


def _for_pip(spec: str, lock: Lock) -> dict[str, str]:
    """Of base `host`: an interpreter, and the versions that the platform's packages have."""
    base = [f"{name}=={version}" for name, version in sorted(lock.base.packages.items())]
    lines = [f"python={lock.python}", "pip", {"pip": [*base, *(f"{p.name}=={p.version}" for p in lock.pip)]}]
    return {"environment.yml": _environment(spec, [], lines), "explicit.txt": "@EXPLICIT\n"}


def _environment(spec: str, channels: list[str], dependencies: list[Any]) -> str:
    name = parse_spec(spec).name
    return yaml.safe_dump({"name": name, "channels": channels, "dependencies": dependencies}, sort_keys=False)


def _pip(lock: CondaLock) -> Iterator[Any]:
    if lock.pip:
        yield {"pip": [f"{package.name}=={package.version}" for package in lock.pip]}


def _md5(md5: str | None) -> str:
    return f"#{md5}" if md5 else ""


# --- in ---


def import_bundle(source: IO[bytes], folder: Path, trust: Trust, places: CondaPlaces) -> Imported:
    """Unpacks into `folder`. What the bundle lacks nodes will fetch from our channels, wherever its maker had them. Raises
    EnvironmentProblem: `environment_bundle_invalid`, `environment_bundle_untrusted`, `environment_unsupported` by policy."""
    opened = read_archive(source, folder, trust)
    spec = _text(opened, SPEC)
    try:
        lock: dict[str, Any] = json.loads(_text(opened, LOCK))
        if not isinstance(lock, dict) or "bundled" in lock:
            raise refused("its lock is none")
        expected = _expected(lock)
    except (ValueError, EnvironmentProblem) as error:
        raise refused(f"{LOCK}: {error}") from None
    if identity(lock) != opened.head.fingerprint:
        raise refused("its lock is not the one that its fingerprint says")
    files = _packages(opened, expected)
    places.policy.check_lock(lock, {name: path.stat().st_size for name, path in files.items()})
    if is_conda(lock):
        lock["pixi"] = _with_our_places(lock, places)
    if missing := [package["filename"] for package in lock["pip"] if package["filename"] not in files]:
        raise refused(f"{missing[0]} is missing")
    solved = Solved(parse_spec(spec), lock, identity(lock), dependency_md5_of(lock))
    return Imported(solved, spec, files, opened.signed_by)


def _text(opened: Opened, name: str) -> str:
    if name not in opened.head.files:
        raise refused(f"{name} is missing")
    try:
        return (opened.folder / name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise refused(f"{name} is not UTF-8") from None


def _expected(lock: dict[str, Any]) -> dict[str, str]:
    """SHA-256 by file name, of a lock that is one."""
    parsed = read_conda_lock(lock) if is_conda(lock) else read_lock(lock)
    packages = [*(parsed.conda if isinstance(parsed, CondaLock) else ()), *parsed.pip]
    return {package.filename: package.sha256 for package in packages}


def _packages(opened: Opened, expected: Mapping[str, str]) -> dict[str, Path]:
    names = [name for name in opened.head.files if "/" in name]
    for name in names:
        if expected.get(name.rsplit("/", 1)[-1]) != opened.head.files[name].sha256:
            raise refused(f"{name} is not a package of its lock")
    return {name.rsplit("/", 1)[-1]: opened.folder / name for name in names}


def _with_our_places(lock: dict[str, Any], places: CondaPlaces) -> str:
    base = conda_bases()[lock["base"]["name"]].channels[0]
    subdirs = {package["filename"]: package["subdir"] for package in lock["conda"]}
    channel = places.policy.channels[base].rstrip("/")
    return with_places(lock["pixi"], {name: f"{channel}/{subdir}/{name}" for name, subdir in subdirs.items()})
