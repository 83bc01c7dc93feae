"""What the installer says of a prefix: its packages and their files, read from `conda-meta`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson


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
    """`cached`: its folder in the package cache. `files` by path from the prefix."""

    name: str
    filename: str
    sha256: str
    cached: Path
    files: dict[str, LinkedFile]

    @property
    def key(self) -> str:
        """For caches: unlike the folder's name it tells two builds of one name apart."""
        return f"{self.cached.name}-{self.sha256[:12]}"


def read_prefix(prefix: Path) -> list[Linked]:
    """In the order of names. Raises OSError, ValueError and KeyError for what is not a prefix."""
    return [_package(orjson.loads(path.read_bytes())) for path in sorted((prefix / "conda-meta").glob("*.json"))]


def _package(meta: dict[str, Any]) -> Linked:
    noarch = meta.get("noarch") == "python"
    files = {path["_path"]: _file(path, noarch) for path in meta["paths_data"]["paths"]}
    return Linked(meta["name"], meta["fn"], meta["sha256"], Path(meta["extracted_package_dir"]), files)


def _file(path: dict[str, Any], noarch: bool) -> LinkedFile:
    name: str = path["_path"]
    source = path.get("original_path") or (_noarch_source(name) if noarch else name)
    return LinkedFile(
        sha256=path.get("sha256_in_prefix") or path.get("sha256"),
        rewritten="prefix_placeholder" in path or path["path_type"] not in ("hardlink", "softlink"),
        source=source,
        symlink=path["path_type"] == "softlink",
    )


def _noarch_source(name: str) -> str:
    """Where it lies in the package: `lib/python3.11/site-packages/` is `site-packages/` there."""
    if name.startswith("bin/"):
        return f"python-scripts/{name.removeprefix('bin/')}"
    _, found, rest = name.partition("/site-packages/")
    return f"site-packages/{rest}" if found else name
