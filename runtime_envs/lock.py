"""Locks: what exactly an environment is made of. `solve` makes one from environment.yml, `read_lock` checks one that
came back from the database. A lock is plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from runtime_envs.errors import BASE_CHANGED, BUILD_FAILED, EnvironmentProblem
from runtime_envs.fingerprint import dependency_md5_of, identity
from runtime_envs.host import HostBase, load_host_base
from runtime_envs.index import PipIndex, machine_index
from runtime_envs.pip import PipSolution, solve_pip
from runtime_envs.spec import EnvironmentSpec, parse_spec
from runtime_envs.window import check_host, check_window

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=200)]
Version_ = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.+!_-]+$", max_length=200)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LockedPackage(_Part):
    """A wheel of the prefix. `filename` says which; where it comes from is the node's package index."""

    name: Name
    version: Version_
    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._+!-]+\.whl$")]
    sha256: Sha256


class LockedBase(_Part):
    """`packages`: what the environment takes from the base, with versions: its identity as far as it matters here."""

    name: Literal["host"]
    packages: dict[Name, Version_]


class Lock(_Part):
    version: Literal[1]
    base: LockedBase
    python: Version_
    platform: Name
    pip: list[LockedPackage]
    bundled: dict[str, str] = {}
    """Files that came with a bundle: name → key in our storage."""


@dataclass(frozen=True)
class Solved:
    """`sizes`: bytes of wheels by file name, where known: not a part of what the environment is."""

    spec: EnvironmentSpec
    lock: dict[str, Any]
    fingerprint: str
    dependency_md5: str
    sizes: Mapping[str, int] = field(default_factory=dict)


def solve(spec_text: str, *, base: HostBase | None = None, index: PipIndex | None = None) -> Solved:
    """environment.yml → lock; seconds, blocking. Without `base` and `index`: this platform, and this machine's pip
    settings. Raises EnvironmentProblem; what it says of a line names that line."""
    spec = parse_spec(spec_text)
    platform = base or load_host_base()
    check_window(spec)
    check_host(spec, platform.python)
    packages = solve_pip(spec.pip, platform, index or machine_index()) if spec.pip else _nothing_over(platform)
    lock = _lock(platform, packages)
    return Solved(spec, lock, identity(lock), dependency_md5_of(lock), packages.sizes)


def default_lock(base: HostBase | None = None) -> dict[str, Any]:
    """The base and nothing over it: what a job without an environment trains in."""
    platform = base or load_host_base()
    return _lock(platform, _nothing_over(platform))


def _nothing_over(base: HostBase) -> PipSolution:
    return PipSolution((), base.closure())


def _lock(base: HostBase, solution: PipSolution) -> dict[str, Any]:
    packages = [
        LockedPackage(name=p.name, version=p.version, filename=p.filename, sha256=p.sha256) for p in solution.packages
    ]
    lock = Lock(
        version=1,
        base=LockedBase(name="host", packages=solution.provided),
        python=base.python,
        platform=base.platform,
        pip=sorted(packages, key=lambda package: package.name),
    )
    return lock.model_dump(exclude={"bundled"})


def read_lock(lock: dict[str, Any]) -> Lock:
    """Raises `environment_build_failed` for what is not a lock: its words go into a requirements file."""
    try:
        return Lock.model_validate(lock)
    except ValidationError as error:
        first = error.errors()[0]
        raise EnvironmentProblem(
            BUILD_FAILED, f"Not a lock of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            hint="Solve the environment again (`heliostat env update`).",
        ) from None  # fmt: skip


def check_base(lock: Lock, base: HostBase) -> None:
    """Raises `environment_base_changed` when this node's platform is not the one that the lock was made for."""
    theirs = {"Python": lock.python, "platform": lock.platform, **lock.base.packages}
    ours = {"Python": base.python, "platform": base.platform} | {
        name: base.version(name) for name in lock.base.packages
    }
    changed = [f"{what} {theirs[what]} → {ours[what] or 'none'}" for what in theirs if theirs[what] != ours[what]]
    if changed:
        raise EnvironmentProblem(
            BASE_CHANGED, f"The platform is not the one this environment was solved for: {', '.join(changed[:5])}.",
            hint="Solve the environment again (`heliostat env update`); the old lock stays in its history.",
        )  # fmt: skip
