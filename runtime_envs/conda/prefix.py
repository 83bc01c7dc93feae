"""What the installer says of a prefix: its packages and their files, read from `conda-meta` and held against the lock."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from runtime_envs.adopt import META
from runtime_envs.materialize import LOCK
from runtime_envs.verify import PREFIX

Pair = tuple[str, str]
"""Of a package: file name and SHA-256."""


@dataclass(frozen=True)
class LinkedFile:
    """`sha256` of the file as it lies in the prefix. `rewritten`: it holds the prefix, so it is this prefix's own; else it is
    a hard link into the package cache, at `source` below the package's folder."""

    sha256: str | None
    rewritten: bool
    source: str
    symlink: bool


@dataclass(frozen=True)
class Linked:
    """`cached`: its folder in the package cache. `paths`: as the installer wrote them down."""

    name: str
    filename: str
    sha256: str
    cached: Path
    noarch: bool
    paths: list[dict[str, Any]] = field(repr=False)

    @property
    def key(self) -> str:
        return cache_key((self.filename, self.sha256))

    @cached_property
    def files(self) -> dict[str, LinkedFile]:
        """By path from the prefix."""
        return {path["_path"]: _file(path, self.noarch) for path in self.paths}

    @property
    def names(self) -> set[str]:
        return {path["_path"] for path in self.paths}

    @property
    def rewritten(self) -> list[str]:
        """Files that are this prefix's own."""
        return [path["_path"] for path in self.paths if _is_rewritten(path)]

    @property
    def clobbered(self) -> list[str]:
        """Paths that it brings and another package's file has; its own lies beside."""
        return [path["original_path"] for path in self.paths if path.get("original_path")]


def meta_name(filename: str) -> str:
    """Where the prefix says what the package `filename` is made of."""
    return f"{META}/{stem(filename)}.json"


def stem(filename: str) -> str:
    """Its folder in the package cache."""
    return filename.removesuffix(".conda").removesuffix(".tar.bz2")


def cache_key(package: Pair) -> str:
    """For caches: unlike the folder's name it tells two builds of one name apart."""
    return f"{stem(package[0])}-{package[1][:12]}"


def packages_of(home: Path) -> set[Pair]:
    """The conda packages of an environment, by its lock; none where that is not there or cannot be read."""
    try:
        lock = orjson.loads((home / LOCK).read_bytes())
        return {(package["filename"], package["sha256"]) for package in lock.get("conda", ())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()  # unfinished, being removed, or damaged: its own check finds that


def read_prefix(home: Path, packages: Collection[Pair]) -> list[Linked]:
    """In the order of names; `packages`: all that must be there, and no other. Raises OSError, ValueError and KeyError for what is
    not a prefix of them: a file in it may have been written by somebody else than the installer."""
    folder = home / PREFIX / META
    expected = {Path(meta_name(package[0])).name: package for package in packages}
    names = sorted(path.name for path in folder.glob("*.json"))
    if names != sorted(expected):
        raise ValueError(f"{META} names other packages than the lock")
    return [_checked(folder / name, expected[name], home.parents[1] / "pkgs") for name in names]


def _checked(file: Path, expected: Pair, cache: Path) -> Linked:
    package = _package(orjson.loads(file.read_bytes()))
    ours = (package.filename, package.sha256) == expected and package.cached == cache / stem(expected[0])
    if not ours or not all(map(_is_inside, package.names)):
        raise ValueError(f"{META}/{file.name} is not what the installer writes")
    return package


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in ("", ".", META) and ".." not in parts


def forget_prefix(prefix: Path, package: Linked) -> None:
    """Takes out of `conda-meta` what is only true in this prefix, the hashes of rewritten files (the manifest has them): so that
    it is one file in all prefixes."""
    if not package.rewritten:
        return
    path = prefix / meta_name(package.filename)
    meta = orjson.loads(path.read_bytes())
    for one in meta["paths_data"]["paths"]:
        if _is_rewritten(one):
            one.pop("sha256_in_prefix", None)
            if one["path_type"] not in ("hardlink", "softlink"):  # made by the installer
                one.pop("sha256", None)
    path.write_bytes(orjson.dumps(meta))


def _package(meta: dict[str, Any]) -> Linked:
    noarch, folder = meta.get("noarch") == "python", Path(meta["extracted_package_dir"])
    return Linked(meta["name"], meta["fn"], meta["sha256"], folder, noarch, meta["paths_data"]["paths"])


def _file(path: dict[str, Any], noarch: bool) -> LinkedFile:
    name: str = path["_path"]
    source = path.get("original_path") or (_noarch_source(name) if noarch else name)
    return LinkedFile(
        sha256=path.get("sha256_in_prefix") or path.get("sha256"),
        rewritten=_is_rewritten(path),
        source=source,
        symlink=path["path_type"] == "softlink",
    )


def _is_rewritten(path: dict[str, Any]) -> bool:
    return "prefix_placeholder" in path or path["path_type"] not in ("hardlink", "softlink")


def _noarch_source(name: str) -> str:
    """Where it lies in the package: `lib/python3.11/site-packages/` is `site-packages/` there."""
    if name.startswith("bin/"):
        return f"python-scripts/{name.removeprefix('bin/')}"
    _, found, rest = name.partition("/site-packages/")
    return f"site-packages/{rest}" if found else name
