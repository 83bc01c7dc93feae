"""The process in which py-rattler runs: for each line of stdin, a question as JSON, lines of JSON on stdout, the last one `result`
or `error`.

A process of its own, because rattler can panic, and can crash when the interpreter ends: hence `os._exit`. Loads nothing of the
house."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import sys
import time
from pathlib import Path
from typing import Any, ClassVar, Final

from rattler import (
    BuildString,
    Client,
    Gateway,
    GenericVirtualPackage,
    InstallerReporter,
    LockChannel,
    LockFile,
    LockPlatform,
    MatchSpec,
    PackageCache,
    PackageCacheLayer,
    PackageName,
    PackageRecord,
    RepoDataRecord,
    Version,
    install,
    solve,
)
from rattler.config import Config
from rattler.exceptions import (
    FetchRepoDataError,
    GatewayError,
    InstallerError,
    InvalidMatchSpecError,
    IoError,
    LinkError,
    SolverError,
)
from rattler.index import index_fs
from rattler.package_cache import ValidationMode

PLATFORM: Final = "linux-64"
ENVIRONMENT = "default"
META = "conda-meta"
STEM = re.compile(r"\.(conda|tar\.bz2)$")
FRESH_S = 60.0
"""For so long channels are not asked again, unless something cannot be had from them."""
JUST_NOW_S = 1.0
DOWNLOADS_AT_ONCE = 4
"""Of what `fetch_process` has left; its limit, for the same reasons, in place of rattler's 50."""
IDLE_S = 600.0
"""Then it ends: the index of conda-forge is hundreds of megabytes."""
KINDS = {
    SolverError: "unsolvable",
    InvalidMatchSpecError: "invalid",
    GatewayError: "channel",
    FetchRepoDataError: "channel",
    InstallerError: "install",
    LinkError: "install",
    IoError: "install",
}


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def solve_specs(question: dict[str, Any]) -> dict[str, Any]:
    """The first of the `alternatives` (lists of specs) that has a solution; the error is the first one's. `base_lock`: its
    records are preferred, those named in `pinned` cannot move. `virtual_packages` are what the nodes have, by name. Writes the
    lock `out`."""
    cache = Path(question["cache"])
    try:
        number, records = await _first_solved(question, Channels.of(cache))
    except SolverError:
        if not Channels.forget(cache):
            raise
        number, records = await _first_solved(question, Channels.of(cache))  # the channel may have it by now
    _write_lock(Path(question["out"]), question["channels"], records)
    return {"alternative": number, "packages": [_described(record) for record in records]}


async def _first_solved(question: dict[str, Any], gateway: Gateway) -> tuple[int, list[RepoDataRecord]]:
    base = _records(question["base_lock"]) if question["base_lock"] else []
    problem: SolverError | None = None
    for number, specs in enumerate(question["alternatives"]):
        try:
            return number, await _solved(question, specs, base, gateway)
        except SolverError as error:
            problem = problem or error
    raise problem or SolverError("there is nothing to solve")


class Channels:
    """What channels hold, read once for a while: a Gateway keeps it in memory and asks no more."""

    _known: ClassVar[dict[Path, tuple[float, Gateway]]] = {}

    @classmethod
    def of(cls, cache: Path) -> Gateway:
        read_at, gateway = cls._known.get(cache, (0.0, None))
        if gateway is None or time.monotonic() - read_at > FRESH_S:
            read_at, gateway = cls._known[cache] = time.monotonic(), Gateway(cache_dir=cache)
        return gateway

    @classmethod
    def forget(cls, cache: Path) -> bool:
        """False when it was read just now."""
        read_at, _ = cls._known.pop(cache)
        return time.monotonic() - read_at > JUST_NOW_S


async def _solved(
    question: dict[str, Any], specs: list[str], base: list[RepoDataRecord], gateway: Gateway
) -> list[RepoDataRecord]:
    records = await solve(
        sources=question["channels"],
        specs=[_parsed(spec) for spec in specs],
        gateway=gateway,
        platforms=[PLATFORM, "noarch"],
        virtual_packages=[_virtual(*one) for one in question["virtual_packages"].items()],
        pinned_packages=[record for record in base if record.name.normalized in question["pinned"]],
        locked_packages=base,
    )
    return sorted(records, key=lambda record: record.name.normalized)


def _parsed(spec: str) -> MatchSpec:
    try:
        return MatchSpec(spec)
    except InvalidMatchSpecError as error:
        raise InvalidMatchSpecError(f"{spec}: {error}") from None


def _virtual(name: str, text: str) -> GenericVirtualPackage:
    version, _, build = text.partition("=")
    return GenericVirtualPackage(PackageName(name), Version(version), BuildString(build or "0"))


def _records(lock: str) -> list[RepoDataRecord]:
    environment = LockFile.from_path(Path(lock)).default_environment()
    assert environment is not None
    # A LockPlatform must be the lock's own: another one panics.
    platform = next(one for one in environment.platforms() if one.name == PLATFORM)
    return environment.conda_repodata_records_for_platform(platform) or []


def _write_lock(path: Path, channels: list[str], records: list[RepoDataRecord]) -> None:
    platform = LockPlatform(PLATFORM)
    lock = LockFile([platform])
    lock.set_channels(ENVIRONMENT, [LockChannel(url) for url in channels])
    for record in records:
        lock.add_conda_package(ENVIRONMENT, platform, record)
    lock.to_path(path)


def _described(record: RepoDataRecord) -> dict[str, Any]:
    return {
        "name": record.name.normalized,
        "version": str(record.version),
        "build": str(record.build),
        "subdir": record.subdir,
        "filename": record.file_name,
        "url": record.url,
        "sha256": record.sha256.hex() if record.sha256 else None,
        "size": record.size,
        "python": record.noarch.python or any(need.split()[0] == "python" for need in record.depends),
        "depends": record.depends,
    }


async def install_lock(question: dict[str, Any]) -> dict[str, Any]:
    """Downloads what the cache lacks and links all into the prefix. `only`: these packages, by name. `validate`: reads the
    cache's files whole and fetches again what is damaged. `written_prefix`: the prefix to write into files."""
    only = question.get("only")
    records = [r for r in _records(question["lock"]) if only is None or r.name.normalized in only]
    records.sort(
        key=lambda record: -(record.size or 0)
    )  # the largest takes longest, on one core: it must not come last
    cache, prefix = Path(question["cache"]), Path(question["prefix"])
    mode = ValidationMode.full() if question.get("validate") else ValidationMode.fast()
    layer = PackageCacheLayer(cache).with_validation_mode(mode)
    await install(
        records,
        target_prefix=prefix,
        package_cache=PackageCache.from_layers([layer]),
        alternative_target_prefix=question.get("written_prefix"),
        execute_link_scripts=False,
        reporter=Progress(len(records), Contents(records, cache, prefix)),  # type: ignore[abstract]  # its methods are empty, not abstract
        client=Client.default_client(),
        config=_config(),
    )
    return {"installed": len(records)}


async def order_packages(question: dict[str, Any]) -> dict[str, Any]:
    """Their names, each after what it needs: the installer gives a path that several bring to the last of them."""
    records: list[PackageRecord] = [*_records(question["lock"])]
    return {"names": [record.name.normalized for record in PackageRecord.sort_topologically(records)]}


def _config() -> Config:
    config = Config()
    config.set("concurrency.downloads", str(DOWNLOADS_AT_ONCE))
    return config


class Refused(Exception):
    """A package that must not be linked."""


class Contents:
    """What packages bring into one prefix, looked at before rattler 0.28 links it: that follows `..` out of the prefix, and writes
    entry points (`bin/…`) in place, into a file of another package that all prefixes share."""

    def __init__(self, records: list[RepoDataRecord], cache: Path, prefix: Path) -> None:
        self._places = {record.name.normalized: cache / STEM.sub("", record.file_name) for record in records}
        self._files: set[str] = set()
        self._made: set[str] = set()
        self._folders: set[str] = set()
        for meta in (prefix / META).glob("*.json"):
            self._note({path["_path"] for path in json.loads(meta.read_bytes())["paths_data"]["paths"]}, set())

    def add(self, name: str) -> None:
        """A package that is in the cache. Raises Refused."""
        try:
            files, made = brought(self._places[name] / "info")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(f"the conda package `{name}` does not say what it brings: {error!r}") from None
        if outside := next((path for path in files if not is_inside(path)), None):
            raise Refused(f"the conda package `{name}` brings `{outside}`, which no package may write")
        self._note(files, made)
        if twice := (self._made & self._files) | (self._folders & (self._files | self._made)):
            path = min(twice)
            raise Refused(
                f"the conda package `{name}` brings `{path}`, as another does, and would be written into its file"
            )

    def _note(self, files: set[str], made: set[str]) -> None:
        self._files |= files
        self._made |= made
        for path in files:
            while (path := path.rpartition("/")[0]) and path not in self._folders:
                self._folders.add(path)


def brought(info: Path) -> tuple[set[str], set[str]]:
    """Paths from the prefix: what a package's description says it brings, and what is made for it there."""
    old = not (info / "paths.json").exists()
    paths = [] if old else json.loads((info / "paths.json").read_bytes())["paths"]
    files = set((info / "files").read_text(encoding="utf-8").splitlines()) if old else set()
    files |= {path["_path"] for path in paths if path.get("path_type") != "directory" or not is_inside(path["_path"])}
    if not (info / "link.json").exists():
        return files, set()
    points = json.loads((info / "link.json").read_bytes()).get("noarch", {}).get("entry_points") or ()
    placed = {re.sub(r"^python-scripts/", "bin/", path) for path in files}
    return placed, {f"bin/{point.partition('=')[0].strip()}" for point in points}


def is_inside(path: str) -> bool:
    parts = path.split("/")
    return parts[0] not in ("", ".", META) and ".." not in parts


class Progress(InstallerReporter):
    """Says what is fetched and linked. rattler 0.28 does not say how much has arrived."""

    def __init__(self, packages: int, contents: Contents) -> None:
        self._packages = packages
        self._contents = contents
        self._linked = 0

    def on_download_completed(self, download_idx: int) -> None:
        say(stage="download")

    def on_link_start(self, operation: int, package_name: str) -> int:
        try:
            self._contents.add(package_name)
        except Refused as error:  # others may be being linked: nothing may go on
            say(error={"kind": "refused", "message": str(error)})
            os._exit(1)
        self._linked += 1
        if self._linked in (1, self._packages):
            say(stage="link", packages=self._linked)
        return operation


async def index_channel(question: dict[str, Any]) -> dict[str, Any]:
    # Without shards: asked again, a plain web server answers 304, which rattler 0.28 takes for a failure.
    await index_fs(Path(question["channel"]), write_shards=False)
    return {}


TASKS = {"solve": solve_specs, "install": install_lock, "order": order_packages, "index": index_channel}


def answer(question: dict[str, Any]) -> None:
    try:
        say(result=asyncio.run(TASKS[question["task"]](question)))
    except tuple(KINDS) as error:
        say(error={"kind": KINDS[type(error)], "message": str(error)})


def main() -> None:
    while select.select([sys.stdin], [], [], IDLE_S)[0] and (line := sys.stdin.readline()):
        answer(json.loads(line))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
