"""What an operator allows in environments: of both kinds, solved here or made elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime_envs.errors import UNSUPPORTED, EnvironmentProblem
from runtime_envs.spec import EnvironmentSpec, refuse
from runtime_envs.window import pypi_name

GIB = 1024**3
WELL_KNOWN = "https://conda.anaconda.org/"
"""A channel's name is short for its URL below this one."""


@dataclass(frozen=True)
class EnvironmentPolicy:
    """`channels`: the ones that tenants may name, and where each is (a URL; a mirror or a folder takes the place of the
    real one). `denied` packages by their name on conda or pip, however it is spelt. Limits of what is fetched for one
    environment; `max_bytes` compressed, a wheel whose index does not tell its size counts nothing."""

    channels: Mapping[str, str]
    denied: frozenset[str] = frozenset()
    max_packages: int = 1000
    max_bytes: int = 30 * GIB

    def channel_url(self, channel: str, line: int | None = None) -> str:
        """Of a channel that a file names, or gives the URL of. Raises `environment_unsupported`."""
        spelt = channel.rstrip("/")
        found = [url for name, url in self.channels.items() if spelt in (name, url.rstrip("/"), WELL_KNOWN + name)]
        if not found:
            allowed = f"Allowed: {', '.join(self.channels)}."
            refuse(line, f"channel `{channel}` is not allowed here", allowed, UNSUPPORTED)
        return found[0]

    def check_spec(self, spec: EnvironmentSpec) -> None:
        """What the file itself asks for. Raises `environment_unsupported` that names the line."""
        for dependency in (*spec.conda, *spec.pip):
            if self._denied([dependency.name]):
                refuse(
                    dependency.line, f"package `{dependency.name}` is not allowed here", "Leave it out.", UNSUPPORTED
                )

    def check_lock(self, lock: dict[str, Any], sizes: Mapping[str, int]) -> None:
        """All that a lock of either kind has over the platform. `sizes`: bytes by file name, of what the lock does not say or
        is not believed. Raises `environment_unsupported`."""
        packages = [*lock.get("conda", ()), *lock["pip"]]
        size = sum(sizes.get(package["filename"], package.get("size") or 0) for package in packages)
        if len(packages) > self.max_packages or size > self.max_bytes:
            raise EnvironmentProblem(
                UNSUPPORTED, f"The environment has {len(packages)} packages of {size / GIB:.1f} GiB.",
                hint=f"Allowed: {self.max_packages} packages of {self.max_bytes / GIB:.1f} GiB in all.",
            )  # fmt: skip
        if denied := self._denied(package["name"] for package in packages):
            raise EnvironmentProblem(
                UNSUPPORTED, f"The environment needs `{denied[0]}`, which is not allowed here.",
                hint="Leave out what needs it.",
            )  # fmt: skip

    def _denied(self, names: Iterable[str]) -> list[str]:
        denied = {pypi_name(name) for name in self.denied}
        return [name for name in names if pypi_name(name) in denied]
