"""Locks of conda environments: Heliostat's head, which is the identity, and the same packages in rattler's format (`pixi`),
which says where each is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from runtime_envs.conda.bases import conda_bases
from runtime_envs.errors import BUILD_FAILED, EnvironmentProblem
from runtime_envs.lock import LockedPackage, Name, Sha256, Version_

CondaName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LockedConda(_Part):
    """A conda package. `size` in bytes, compressed."""

    name: CondaName
    version: Version_
    build: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._+-]*$", max_length=200)]
    subdir: Literal["linux-64", "noarch"]
    filename: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._+!-]+\.(conda|tar\.bz2)$")]
    sha256: Sha256
    size: int | None


class CondaBaseRef(_Part):
    """`packages`: what comes from the base, by name."""

    name: Name
    packages: dict[CondaName, Version_]


class CondaLock(_Part):
    version: Literal[1]
    base: CondaBaseRef
    python: Version_
    platform: Literal["linux-64"]
    conda: list[LockedConda]
    pip: list[LockedPackage]
    pixi: str = Field(repr=False)
    bundled: dict[str, str] = {}

    @property
    def minor(self) -> str:
        return ".".join(self.python.split(".")[:2])


def is_conda(lock: dict[str, Any]) -> bool:
    base = lock.get("base")
    return isinstance(base, dict) and base.get("name") in conda_bases()


def read_conda_lock(lock: dict[str, Any]) -> CondaLock:
    """Raises `environment_build_failed` for what is not a lock, or whose places are of other packages than its identity."""
    try:
        parsed = CondaLock.model_validate(lock)
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_a_lock(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if _placed(parsed.pixi) != {(package.filename, package.sha256) for package in parsed.conda}:
        raise _not_a_lock("its places are not those of its packages")
    return parsed


def _placed(text: str) -> set[tuple[str, str]]:
    try:
        packages = _read_yaml(text)["packages"]
        conda = [package for package in packages if "conda" in package]
        return {(package["conda"].rsplit("/", 1)[-1], package["sha256"]) for package in conda}
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise _not_a_lock("its places cannot be read") from None


def _not_a_lock(why: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        BUILD_FAILED, f"Not a lock of this version: {why}.",
        hint="Solve the environment again (`heliostat env update`).",
    )  # fmt: skip


def _read_yaml(text: str) -> Any:
    """By libyaml where PyYAML has it: a tenth of the time."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _write_yaml(content: Any) -> str:
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(content, Dumper=dumper, sort_keys=False, allow_unicode=True))


def with_pip(pixi: str, packages: list[dict[str, str]]) -> str:
    """rattler's lock with these pip packages ({name, version, sha256, url}) beside the conda ones."""
    if not packages:
        return pixi
    content = _read_yaml(pixi)
    environment = content["environments"]["default"]
    environment["indexes"] = []
    (listed,) = environment["packages"].values()
    listed += [{"pypi": package["url"]} for package in packages]
    content["packages"] += [
        {"pypi": package["url"], **{key: package[key] for key in ("name", "version", "sha256")}} for package in packages
    ]
    return _write_yaml(content)


def places_of(pixi: str) -> dict[str, tuple[str, str | None]]:
    """File name of each conda package → its URL, and its MD5, which old clients want."""
    packages = [package for package in _read_yaml(pixi)["packages"] if "conda" in package]
    return {package["conda"].rsplit("/", 1)[-1]: (_url(package["conda"]), package.get("md5")) for package in packages}


def _url(place: str) -> str:
    """rattler writes a channel on this disk as a path."""
    return place if "://" in place else Path(place).as_uri()


def with_places(pixi: str, urls: Mapping[str, str]) -> str:
    """rattler's lock with other places for the conda packages that `urls` names by file."""
    content = _read_yaml(pixi)
    for environment in content["environments"].values():
        for listed in environment["packages"].values():
            _move(listed, urls)
    _move(content["packages"], urls)
    for package in content["packages"]:
        if package.get("conda") in urls.values():
            package["subdir"] = package["conda"].rsplit("/", 2)[1]  # of a file rattler does not see it from the place
    return _write_yaml(content)


def _move(packages: list[dict[str, Any]], urls: Mapping[str, str]) -> None:
    for package in packages:
        if "conda" in package:
            package["conda"] = urls.get(package["conda"].rsplit("/", 1)[-1], package["conda"])
