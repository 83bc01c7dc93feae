"""The bases that are made of conda packages, as `bases/*.yaml` declare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[1] / "bases"


@dataclass(frozen=True)
class CondaBase:
    """`core` (conda specs) is never replaced by a tenant, `packages` is there unless the tenant asks for another version.
    `virtual_packages` (name → version, or version=build): what every node that it is for has at least, whatever the machine has
    that solves."""

    name: str
    channels: tuple[str, ...]
    core: tuple[str, ...]
    packages: tuple[str, ...]
    virtual_packages: Mapping[str, str]

    @property
    def specs(self) -> tuple[str, ...]:
        return (*self.core, *self.packages)

    @property
    def core_names(self) -> frozenset[str]:
        return frozenset(spec.split()[0] for spec in self.core) | {"python"}


@cache
def conda_bases() -> dict[str, CondaBase]:
    declared = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.yaml"))]
    return {
        one["name"]: CondaBase(
            one["name"],
            tuple(one["channels"]),
            tuple(one["core"]),
            tuple(one.get("packages") or ()),
            one["virtual_packages"],
        )
        for one in declared
        if one.get("kind") == "conda"
    }
