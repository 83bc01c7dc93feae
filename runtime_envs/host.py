"""The base `host`: the platform's own Python and packages, and prefixes that see them."""

from __future__ import annotations

import platform
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from runtime_envs.errors import BASE_CHANGED, EnvironmentProblem

BASE_FILE = Path(__file__).parent / "bases" / "host.yaml"
PLATFORM_PTH = "heliostat_platform.pth"


@dataclass(frozen=True)
class Installed:
    """A package of the platform. `requires`, `extras` as in its metadata; `folder` is the site-packages it lies in."""

    name: str
    version: str
    requires: tuple[str, ...]
    extras: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class HostBase:
    """`core` packages are never replaced; `installed` are all packages of the platform by canonical name. `own_python`: its
    interpreter is the one that runs this."""

    name: str
    python: str
    platform: str
    core: tuple[str, ...]
    installed: Mapping[str, Installed]
    own_python: bool = True

    def version(self, name: str) -> str | None:
        package = self.installed.get(name)
        return package.version if package else None

    def closure(self) -> dict[str, str]:
        """Versions of the core packages and of all that they need, by name."""
        found: dict[str, str] = {}
        wanted = list(self.core)
        while wanted:
            package = self.installed.get(wanted.pop())
            if package and package.name not in found:
                found[package.name] = package.version
                wanted.extend(_needed(package.requires))
        return dict(sorted(found.items()))

    def site_folders(self) -> list[Path]:
        """Where the core and what it needs lie, in the order of sys.path."""
        used = {self.installed[name].folder for name in self.closure()}
        order = {Path(entry): position for position, entry in enumerate(sys.path)}
        return sorted(used, key=lambda folder: (order.get(folder, len(order)), str(folder)))


def load_host_base(core: tuple[str, ...] | None = None) -> HostBase:
    """The base of this process's Python. `core` None: as bases/host.yaml says. Raises when one of it is missing."""
    declared = _declared_core() if core is None else core
    installed = _installed()
    if missing := [name for name in declared if name not in installed]:
        raise EnvironmentProblem(
            BASE_CHANGED, f"The platform lacks {', '.join(missing)}, which the base `host` is made of.",
            hint="Install Heliostat again with its constraints file.", fixable_by="operator",
        )  # fmt: skip
    return HostBase("host", platform.python_version(), sysconfig.get_platform(), declared, installed)


@cache
def _declared_core() -> tuple[str, ...]:
    text = BASE_FILE.read_text(encoding="utf-8")
    return tuple(canonicalize_name(name) for name in yaml.safe_load(text)["core"])


@cache
def _installed() -> dict[str, Installed]:
    # Once a process: reading 160 metadata files takes 0.2 s, and a running platform does not change.
    found: dict[str, Installed] = {}
    for distribution in metadata.distributions():
        package = _describe(distribution)
        if package:
            found.setdefault(package.name, package)  # the first on sys.path is the one that imports
    return found


def _describe(distribution: metadata.Distribution) -> Installed | None:
    fields = distribution.metadata
    if not fields["Name"]:  # what a broken uninstall leaves behind
        return None
    return Installed(
        name=canonicalize_name(fields["Name"]),
        version=str(Version(distribution.version)),
        requires=tuple(fields.get_all("Requires-Dist") or ()),
        extras=tuple(fields.get_all("Provides-Extra") or ()),
        folder=Path(str(distribution.locate_file(""))),
    )


def _needed(requires: Iterable[str]) -> Iterable[str]:
    for text in requires:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield canonicalize_name(requirement.name)


def make_prefix(prefix: Path, base: HostBase) -> None:
    """A venv over the platform. A venv made from a venv does not see its parent's packages, hence the .pth; what is
    installed into the prefix comes first on sys.path and wins."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(prefix)
    lines = "".join(f"{folder}\n" for folder in base.site_folders())
    (site_packages(prefix) / PLATFORM_PTH).write_text(lines, encoding="utf-8")


def site_packages(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def python_of(prefix: Path) -> Path:
    return prefix / "bin" / "python"
