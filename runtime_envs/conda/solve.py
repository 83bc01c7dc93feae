"""environment.yml over a conda base → lock: py-rattler for the conda packages, with the base pinned, then uv for `pip:` with all
of those as constraints."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from runtime_envs.conda.bases import CondaBase, conda_bases
from runtime_envs.conda.engine import ask_again
from runtime_envs.conda.lock import CondaLock, with_pip
from runtime_envs.errors import BASE_UNAVAILABLE, INVALID, UNSOLVABLE, UNSUPPORTED, EnvironmentProblem
from runtime_envs.fingerprint import dependency_md5_of, identity
from runtime_envs.host import HostBase, Installed
from runtime_envs.index import PipIndex
from runtime_envs.lock import Solved
from runtime_envs.pip import PipSolution, Resolved, solve_pip
from runtime_envs.policy import EnvironmentPolicy
from runtime_envs.spec import Channel, Dependency, EnvironmentSpec, refuse
from runtime_envs.window import PYTHONS, allows_minor, pypi_name


@dataclass(frozen=True)
class CondaPlaces:
    """`cache`: repodata, and the locks of the bases, which stay as first solved until an operator removes them."""

    policy: EnvironmentPolicy
    cache: Path
    index: PipIndex = field(default_factory=PipIndex)


Package = dict[str, Any]
"""As the engine describes it."""


def solve_conda(spec: EnvironmentSpec, places: CondaPlaces) -> Solved:
    """Seconds, blocking. Raises EnvironmentProblem; a conflict comes as the solver's tree, with the tenant's line marked. Of the
    policy it heeds the channels only."""
    base = conda_bases()[spec.base]
    channels = _channels(spec, base, places.policy)
    minor, base_lock = _base_lock(spec, base, places)
    specs = [f"python {minor}.*", *base.specs, *(_match_spec(d, places.policy) for d in _asked(spec))]
    with tempfile.TemporaryDirectory(prefix="heliostat-solve-") as folder:
        out = Path(folder) / "pixi.lock"
        question = {"alternatives": [specs], "base_lock": str(base_lock), "pinned": sorted(base.core_names)}
        try:
            answer = ask_again(_solve_task(base, channels, places) | question | {"out": str(out)})
            packages: list[Package] = answer["packages"]
        except EnvironmentProblem as problem:
            raise _marked(problem, spec) from None
        pixi = out.read_text(encoding="utf-8")
    _refuse_unhashed(packages)
    _refuse_other_channels(spec, packages, places.policy)
    _refuse_overrides(spec.pip, packages)
    over = solve_pip(spec.pip, _as_base(base.name, packages), places.index) if spec.pip else PipSolution((), {})
    return _solved(spec, packages, base_lock.read_text(encoding="utf-8"), (pixi, over))


def _solved(spec: EnvironmentSpec, packages: list[Package], base_lock: str, answer: tuple[str, PipSolution]) -> Solved:
    pixi, over = answer
    from_base = {p["name"]: p["version"] for p in packages if p["sha256"] in base_lock}
    kept = ("name", "version", "build", "subdir", "filename", "sha256", "size")
    lock = CondaLock.model_validate(
        {
            "version": 1,
            "base": {"name": spec.base, "packages": from_base},
            "python": _python_of(packages),
            "platform": "linux-64",
            "conda": [{key: package[key] for key in kept} for package in packages],
            "pip": [_pip_entry(package) for package in sorted(over.packages, key=lambda p: p.name)],
            "pixi": with_pip(pixi, [_pip_place(package) for package in over.packages]),
        }
    ).model_dump(exclude={"bundled"})
    return Solved(spec, lock, identity(lock), dependency_md5_of(lock), over.sizes)


def _pip_entry(package: Resolved) -> dict[str, str]:
    return {key: getattr(package, key) for key in ("name", "version", "filename", "sha256")}


def _pip_place(package: Resolved) -> dict[str, str]:
    return {key: getattr(package, key) for key in ("name", "version", "sha256", "url")}


def _python_of(packages: Iterable[Package]) -> str:
    return next(package["version"] for package in packages if package["name"] == "python")


# --- the base ---


def _base_lock(spec: EnvironmentSpec, base: CondaBase, places: CondaPlaces) -> tuple[str, Path]:
    """The newest Python minor that the file allows and the base has, and the lock of the base with it. One that was solved
    before stays, so that environments share it."""
    minors = [m for m in reversed(PYTHONS) if spec.python is None or allows_minor(spec.python.specifier, m)]
    channels = [places.policy.channel_url(name) for name in base.channels]
    virtual = [f"{name}={version}" for name, version in sorted(base.virtual_packages.items())]
    digest = hashlib.sha256("\n".join((*channels, *base.specs, *virtual)).encode()).hexdigest()[:16]
    locks = {minor: places.cache / "bases" / f"{base.name}-{minor}-{digest}.lock" for minor in minors}
    made = next((minor for minor in minors if locks[minor].is_file()), None)
    if made is None:
        locks[minors[0]].parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=places.cache / "bases") as folder:
            out = Path(folder) / "pixi.lock"
            made = minors[_solve_base(spec, base, minors, _solve_task(base, channels, places) | {"out": str(out)})]
            out.replace(locks[made])
    return made, locks[made]


def _solve_base(spec: EnvironmentSpec, base: CondaBase, minors: Sequence[str], task: dict[str, Any]) -> int:
    alternatives = [[f"python {minor}.*", *base.specs] for minor in minors]
    try:
        return int(ask_again(task | {"alternatives": alternatives})["alternative"])
    except EnvironmentProblem as problem:
        if problem.code != UNSOLVABLE:
            raise
        raise EnvironmentProblem(
            BASE_UNAVAILABLE, f"The base `{base.name}` cannot be had here: {problem}",
            hint="Ask for another Python, or the operator to add this one to `channels` under `[environments]`."
            if spec.python else "The operator should check `channels` under `[environments]`.",
            line=spec.python.line if spec.python else None, fixable_by="user" if spec.python else "operator",
        ) from None  # fmt: skip


def _solve_task(base: CondaBase, channels: Sequence[str], places: CondaPlaces) -> dict[str, Any]:
    cache = places.cache / "repodata"
    cache.mkdir(parents=True, exist_ok=True)
    return {
        "task": "solve",
        "channels": list(channels),
        "cache": str(cache),
        "base_lock": None,
        "pinned": [],
        "virtual_packages": dict(base.virtual_packages),
    }


# --- what the file asks for ---


def _asked(spec: EnvironmentSpec) -> list[Dependency]:
    return [*([spec.python] if spec.python else []), *spec.conda]


def _channels(spec: EnvironmentSpec, base: CondaBase, policy: EnvironmentPolicy) -> list[str]:
    """The base's first: with strict priority a tenant's channel brings another package of a name that they have only to whoever
    asks for it (`mine::name`). Raises for one that is not allowed."""
    named = [Channel(d.channel, d.line) for d in _asked(spec) if d.channel]
    own = [policy.channel_url(channel.name, channel.line) for channel in (*spec.channels, *named)]
    return list(dict.fromkeys((*(policy.channel_url(name) for name in base.channels), *own)))


def _match_spec(dependency: Dependency, policy: EnvironmentPolicy) -> str:
    channel = f"{policy.channel_url(dependency.channel)}::" if dependency.channel else ""
    return f"{channel}{dependency.match_spec}"


# --- what is refused ---


def _refuse_unhashed(packages: Iterable[Package]) -> None:
    for package in packages:
        if package["sha256"] is None:
            raise EnvironmentProblem(INVALID, f"The channel has no SHA-256 of `{package['filename']}`.")


def _refuse_other_channels(spec: EnvironmentSpec, packages: Iterable[Package], policy: EnvironmentPolicy) -> None:
    """What the base has is taken from there, whatever channel the file names for it."""
    urls = {package["name"]: package["url"] for package in packages}
    for dependency in _asked(spec):
        name = dependency.conda_name
        if dependency.channel and not urls[name].startswith(policy.channel_url(dependency.channel).rstrip("/") + "/"):
            refuse(dependency.line, f"`{dependency.text}`: the base `{spec.base}` has its own {name}",
                   f"Write `{name}` without a channel.", UNSUPPORTED)  # fmt: skip


def _refuse_overrides(wanted: Sequence[Dependency], packages: Sequence[Package]) -> None:
    """pip over a conda package would leave conda-meta lying about what is installed."""
    ours = {pypi_name(package["name"]): package for package in packages if _is_python(package)}
    for dependency in wanted:
        package = ours.get(dependency.name)
        if package is None:
            continue
        if not dependency.specifier.contains(package["version"], prereleases=True):
            refuse(
                dependency.line,
                f"`{dependency.text}`: conda installs {package['name']} {package['version']}, which pip may not replace",
                f"Move it out of `- pip:`, as `{package['name']}{dependency.specifier}`, or allow this version.",
                UNSOLVABLE,
            )
        if Requirement(dependency.text).extras:
            refuse(dependency.line, f"`{dependency.text}`: conda installs {package['name']}, without extras",
                   "List what the extra needs.", UNSOLVABLE)  # fmt: skip


def _marked(problem: EnvironmentProblem, spec: EnvironmentSpec) -> EnvironmentProblem:
    """The solver's tree, with the lines of environment.yml behind what they asked for."""
    own = _asked(spec)
    line: int | None = None
    marked = []
    for text in problem.message.splitlines():
        named = next((d for d in own if _names(text, d)), None)
        line = line or (named.line if named else None)
        marked.append(f"{text}   ◀ environment.yml line {named.line}: {named.text}" if named else text)
    return EnvironmentProblem(
        problem.code, "\n".join(marked), hint=problem.hint, line=line, fixable_by=problem.fixable_by
    )


def _names(text: str, dependency: Dependency) -> bool:
    """The branches of the tree begin with a spec."""
    match = re.match(r"[\s│├└─]*(?:Cannot solve.*?: )?(?:No candidates were found for )?([\w.-]+)", text)
    return match is not None and canonicalize_name(match[1]) == dependency.name


# --- conda packages as pip sees them ---


def _is_python(package: Package) -> bool:
    try:
        Version(package["version"])
    except InvalidVersion:
        return False
    return bool(package["python"])


def _as_base(name: str, packages: Sequence[Package]) -> HostBase:
    """All of it is core: pip may add, never replace. No requirements: the conda solver has met them."""
    installed = {
        pypi_name(package["name"]): Installed(pypi_name(package["name"]), package["version"], (), (), Path())
        for package in packages
        if _is_python(package)
    }
    base = HostBase(name, _python_of(packages), "linux-64", tuple(sorted(installed)), installed)
    return replace(base, own_python=False)
