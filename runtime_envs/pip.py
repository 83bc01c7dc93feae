"""Solves the pip part of an environment over a base. Nothing is installed, and no package's code runs: wheels only."""

from __future__ import annotations

import re
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.tags import Tag, compatible_tags, cpython_tags, platform_tags, sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from platformdirs import user_cache_path

from runtime_envs.base_wheels import base_wheels
from runtime_envs.errors import INDEX_FAILED, INVALID, UNSOLVABLE, EnvironmentProblem
from runtime_envs.host import HostBase, Installed
from runtime_envs.index import PipIndex
from runtime_envs.spec import Dependency
from runtime_envs.uv import UvResult, run_uv

MAX_REASON_CHARS = 3000


@dataclass(frozen=True)
class Resolved:
    """`filename`, `sha256`, `url` (where it was found, without a password) and `size` in bytes (None: nobody tells) of the wheel
    for this platform; empty for what the base has."""

    name: str
    version: str
    filename: str
    sha256: str
    url: str = ""
    size: int | None = None


@dataclass(frozen=True)
class PipSolution:
    """`packages` go into the prefix; `provided` are the base's (name → version), the core and its needs included."""

    packages: tuple[Resolved, ...]
    provided: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by file name."""
        return {package.filename: package.size for package in self.packages if package.size is not None}


def solve_pip(wanted: Sequence[Dependency], base: HostBase, index: PipIndex) -> PipSolution:
    """The core is required at the base's versions, so that what it needs stays consistent; the other packages of the
    base are preferred, and the tenant's wins. Raises `environment_unsolvable` with the resolver's reason."""
    with tempfile.TemporaryDirectory(prefix="heliostat-solve-") as folder:
        scratch = Path(folder)
        arguments = _write_question(scratch, wanted, base, index)
        result = run_uv(arguments, index, scratch=scratch)
        if result.returncode != 0:
            raise _problem(result, wanted, base)
        answer = tomllib.loads((scratch / "pylock.toml").read_text(encoding="utf-8"))
    packages = answer.get("packages", [])
    provided = {p["name"]: p["version"] for p in packages if base.version(canonicalize_name(p["name"])) == p["version"]}
    tags = _tags(base)
    over = tuple(_resolved(p, tags) for p in packages if p["name"] not in provided)
    return PipSolution(over, dict(sorted(provided.items())))


def _write_question(scratch: Path, wanted: Iterable[Dependency], base: HostBase, index: PipIndex) -> list[str]:
    core = [f"{name}=={base.installed[name].version}" for name in base.core]
    lines = [*index.lines(), *core, *(dependency.text for dependency in wanted)]
    (scratch / "requirements.in").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (scratch / "pylock.toml").write_text(_preferences(base.installed.values()), encoding="utf-8")
    cache_dir = (index.cache_dir or user_cache_path("heliostat")).absolute()
    stubs = base_wheels(base.installed.values(), cache_dir)
    target = [] if base.own_python else ["--python-version", base.python]
    return ["pip", "compile", "requirements.in", "--output-file", "pylock.toml", "--python", sys.executable,
            "--no-build", "--find-links", str(stubs), "--no-header", "--no-annotate",
            "--cache-dir", str(cache_dir / "uv"), *target]  # fmt: skip


def _preferences(installed: Iterable[Installed]) -> str:
    """uv keeps the versions of the file that it writes to, where it can."""
    entries = (f'[[packages]]\nname = "{package.name}"\nversion = "{package.version}"\n' for package in installed)
    return 'lock-version = "1.0"\ncreated-by = "heliostat"\n' + "".join(entries)


def _tags(base: HostBase) -> list[Tag]:
    return list(sys_tags()) if base.own_python else python_tags(base.python)


def python_tags(python: str) -> list[Tag]:
    """Of wheels that this version of CPython can use on this platform, best first."""
    version = [int(part) for part in python.split(".")[:2]]
    name = f"cp{version[0]}{version[1]}"
    platforms = list(platform_tags())
    return [*cpython_tags(version, platforms=platforms), *compatible_tags(version, name, platforms)]


def _resolved(package: dict[str, Any], tags: Sequence[Tag]) -> Resolved:
    """The wheel that fits this platform best, so that a lock does not change when others are added to the release."""
    rank = {tag: position for position, tag in enumerate(tags)}
    candidates = [(_rank(name, rank), name, wheel) for wheel in package.get("wheels", ()) if (name := _filename(wheel))]
    best = min((c for c in candidates if c[0] is not None and c[2].get("hashes", {}).get("sha256")), default=None,
               key=lambda candidate: (candidate[0], candidate[1]))  # fmt: skip
    if best is None:
        raise EnvironmentProblem(
            UNSOLVABLE, f"{package['name']} {package['version']} has no wheel with a SHA-256 for this platform.",
            hint="Choose another version; packages are not built from source here.",
        )  # fmt: skip
    _, filename, wheel = best
    return Resolved(
        package["name"],
        package["version"],
        filename,
        wheel["hashes"]["sha256"],
        _url(wheel, filename),
        wheel.get("size") or _size_here(wheel),
    )


def _size_here(wheel: dict[str, Any]) -> int | None:
    """Of a folder's wheels uv tells no size."""
    place = urlsplit(wheel.get("url") or "")
    file = Path(unquote(place.path))
    return file.stat().st_size if place.scheme == "file" and file.is_file() else None


def _url(wheel: dict[str, Any], filename: str) -> str:
    parts = urlsplit(wheel.get("url") or "")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.netloc else filename


def _filename(wheel: dict[str, Any]) -> str:
    place = wheel.get("name") or wheel.get("url") or wheel.get("path") or ""
    return unquote(urlsplit(place).path).rsplit("/", 1)[-1]


def _rank(filename: str, rank: dict[Any, int]) -> int | None:
    try:
        tags = parse_wheel_filename(filename)[3]
    except InvalidWheelFilename:
        return None
    return min((rank[tag] for tag in tags if tag in rank), default=None)


def _problem(result: UvResult, wanted: Sequence[Dependency], base: HostBase) -> EnvironmentProblem:
    reason = result.message.partition("cause: ")[2] or result.message
    if "Couldn't parse requirement" in result.message:  # uv reads fewer versions than pip's own grammar
        raise EnvironmentProblem(
            INVALID, f"A pip line cannot be read: {reason}", hint="Write the version as the index names it."
        )
    if "No solution found" not in result.message:
        return EnvironmentProblem(
            INDEX_FAILED, f"The packages could not be looked up: {reason}",
            hint="Try again; if it stays, the operator should check the package index.", fixable_by="operator",
        )  # fmt: skip
    culprit = next((d for d in wanted if _mentions(reason, d.name)), None)
    where = f"environment.yml line {culprit.line} (`{culprit.text}`): " if culprit else ""
    return EnvironmentProblem(
        UNSOLVABLE, f"{where}{reason}", hint=_hint(reason, base), line=culprit.line if culprit else None
    )


def _mentions(reason: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", reason) is not None


def _hint(reason: str, base: HostBase) -> str:
    core = [f"{name} {base.version(name)}" for name in base.core if _mentions(reason, name)]
    if core:
        return f"The base `{base.name}` has {', '.join(core)}, which cannot be replaced: leave it out or allow this version."
    return "Loosen or change the named version, or check the spelling of the package."
