"""What Heliostat can train with: checks a spec against the supported window and against the base. Pure."""

from __future__ import annotations

from typing import Final

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from runtime_envs.errors import UNSUPPORTED
from runtime_envs.spec import Dependency, EnvironmentSpec, refuse

PYTHONS: Final = ("3.10", "3.11", "3.12", "3.13")
MINIMUM: Final = {"torch": Version("2.4"), "transformers": Version("4.45"), "peft": Version("0.12")}
PYPI_NAMES: Final = {"pytorch": "torch"}
"""Conda names that are called otherwise on a pip index."""
WINDOW: Final = (
    f"Supported: Python {PYTHONS[0]}–{PYTHONS[-1]}, " + ", ".join(f"{name} ≥ {v}" for name, v in MINIMUM.items()) + "."
)


def check_window(spec: EnvironmentSpec) -> None:
    """Raises `environment_unsupported` that names the first line outside the window, in the order of the file."""
    python = [spec.python] if spec.python else []
    for dependency in sorted((*python, *spec.conda, *spec.pip), key=lambda d: d.line):
        name = pypi_name(dependency.name)
        if name == "python" and not any(allows_minor(dependency.specifier, minor) for minor in PYTHONS):
            refuse(dependency.line, f"`{dependency.text}` is not a supported Python", WINDOW, UNSUPPORTED)
        if name in MINIMUM and not allows_from(dependency.specifier, MINIMUM[name]):
            refuse(dependency.line, f"`{dependency.text}` is too old: {name} must be at least {MINIMUM[name]}",
                   WINDOW, UNSUPPORTED)  # fmt: skip


def check_host(spec: EnvironmentSpec, python: str) -> None:
    """The base `host` is the platform's own Python (`python`: its full version) and takes pip packages only."""
    minor = ".".join(python.split(".")[:2])
    if spec.python and not allows_minor(spec.python.specifier, minor):
        refuse(spec.python.line, f"`{spec.python.text}`: the base `host` has Python {python}",
               f"Write `python={minor}`, or leave Python out.", UNSUPPORTED)  # fmt: skip
    if spec.conda:
        _refuse_conda(spec.conda[0])


def _refuse_conda(dependency: Dependency) -> None:
    refuse(dependency.line, f"`{dependency.text}` is a conda package; the base `host` takes pip packages only",
           f"Move it under `- pip:` as `{pypi_name(dependency.name)}`.", UNSUPPORTED)  # fmt: skip


def pypi_name(conda_name: str) -> str:
    """Canonical; a pip name stays what it is."""
    name = canonicalize_name(conda_name)
    return PYPI_NAMES.get(name, name)


def allows_minor(specifier: SpecifierSet, minor: str) -> bool:
    """Whether some patch release of this minor version is in the set."""
    return any(specifier.contains(f"{minor}.{patch}") for patch in range(40))


def allows_from(specifier: SpecifierSet, minimum: Version) -> bool:
    """Whether the set has a version of at least `minimum`. A set is made of ranges that begin or end at the versions it
    names, so these, their next neighbours and the two ends are all that need a look."""
    named = [version for part in specifier if (version := _version(part.version.removesuffix(".*")))]
    probes = [
        minimum,
        Version("99999"),
        *named,
        *(Version(f"{version.public}.0.0.1") for version in named if _plain(version)),
    ]
    return any(probe >= minimum and specifier.contains(probe, prereleases=True) for probe in probes)


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:  # `===` takes any text
        return None


def _plain(version: Version) -> bool:
    return version.public == version.base_version
