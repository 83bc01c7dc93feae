"""Writes conda packages (`.conda`): a zip of `metadata.json`, the files and their description, both as tar.zst.
The same entries give the same bytes. Knows nothing of wheels or interpreters."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

PLACEHOLDER = "/heliostat_prefix_" + "placehold_" * 24
"""Stands for the prefix in text files; the installer writes the real one. As long as any prefix may be."""
MTIME_S = 1_577_836_800
"""Of every file (2020-01-01): byte code names the time of its source, so it must not depend on the build."""
ARCHITECTURE, NOARCH = "linux-64", "noarch"


@dataclass(frozen=True)
class Entry:
    """A file of a package, or a symbolic link (`link_to`). A text file that holds `PLACEHOLDER` is rewritten on install."""

    path: str
    data: bytes = b""
    executable: bool = False
    link_to: str | None = None


@dataclass(frozen=True)
class Package:
    """`depends` are conda specs. `noarch`: pure Python, files under `site-packages/` and `python-scripts/`;
    `entry_points` (`name = module:function`) are then made by the installer."""

    name: str
    version: str
    build: str
    depends: tuple[str, ...] = ()
    noarch: bool = False
    entry_points: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def subdir(self) -> str:
        return NOARCH if self.noarch else ARCHITECTURE

    @property
    def stem(self) -> str:
        return f"{self.name}-{self.version}-{self.build}"

    def file(self, channel: Path) -> Path:
        return channel / self.subdir / f"{self.stem}.conda"


def write_package(channel: Path, package: Package, entries: Iterable[Entry]) -> Path:
    """The new file below `channel`; written aside and renamed, so that a reader never sees half of it."""
    target = package.file(channel)
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        files, info = Path(scratch) / "pkg.tar.zst", Path(scratch) / "info.tar.zst"
        paths = _write_files(files, entries)
        _write_tar(info, [_text(f"info/{name}", text) for name, text in _description(package, paths).items()])
        aside = Path(scratch) / "package.conda"
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps({"conda_pkg_format_version": 2}))
            _store(archive, f"info-{package.stem}.tar.zst", info)
            _store(archive, f"pkg-{package.stem}.tar.zst", files)
        aside.replace(target)
    target.chmod(0o644)
    return target


def _write_files(target: Path, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    paths: list[dict[str, Any]] = []

    def described() -> Iterable[Entry]:
        for entry in entries:
            paths.append(_path(entry))
            yield entry

    _write_tar(target, described())
    return paths


def _write_tar(target: Path, entries: Iterable[Entry]) -> None:
    with pa.CompressedOutputStream(str(target), "zstd") as stream:
        with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as archive:
            for entry in entries:
                archive.addfile(_tar_info(entry), io.BytesIO(entry.data))


def _tar_info(entry: Entry) -> tarfile.TarInfo:
    info = tarfile.TarInfo(entry.path)
    info.mtime = MTIME_S
    info.mode = 0o755 if entry.executable else 0o644
    if entry.link_to is None:
        info.size = len(entry.data)
    else:
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, entry.link_to, 0o777
    return info


def _path(entry: Entry) -> dict[str, Any]:
    described: dict[str, Any] = {
        "_path": entry.path,
        "path_type": "hardlink" if entry.link_to is None else "softlink",
        "sha256": hashlib.sha256(entry.data).hexdigest(),
        "size_in_bytes": len(entry.data),
    }
    if PLACEHOLDER.encode() in entry.data:
        described |= {"prefix_placeholder": PLACEHOLDER, "file_mode": "text"}
    return described


def _description(package: Package, paths: list[dict[str, Any]]) -> dict[str, str]:
    index: dict[str, Any] = {
        "name": package.name,
        "version": package.version,
        "build": package.build,
        "build_number": 0,
        "depends": list(package.depends),
        "subdir": package.subdir,
        "timestamp": MTIME_S * 1000,
    }
    texts: dict[str, Any] = {"about.json": dict(package.about), "paths.json": {"paths": paths, "paths_version": 1}}
    if package.noarch:
        index["noarch"] = "python"
        noarch = {"type": "python", "entry_points": list(package.entry_points)}
        texts["link.json"] = {"noarch": noarch, "package_metadata_version": 1}
    texts["index.json"] = index
    files = "".join(f"{path['_path']}\n" for path in paths)
    return {"files": files, **{name: json.dumps(value) for name, value in texts.items()}}


def _text(path: str, text: str) -> Entry:
    return Entry(path, text.encode())


def _store(archive: zipfile.ZipFile, name: str, source: Path) -> None:
    with source.open("rb") as data, _opened(archive, name) as target:
        while chunk := data.read(1 << 20):
            target.write(chunk)


def _opened(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)
