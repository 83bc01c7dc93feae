"""Pure changes to environment.yml and comparisons of locks, for `heliostat env add` and `env diff`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from runtime_envs.spec import parse_spec, pip_dependency


@dataclass(frozen=True)
class VersionChange:
    """`before` None: added; `after` None: removed."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class LockDiff:
    """What a training would see differently: packages of prefix and base together."""

    added: tuple[VersionChange, ...]
    removed: tuple[VersionChange, ...]
    changed: tuple[VersionChange, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def add_packages(spec_text: str, packages: Sequence[str]) -> str:
    """environment.yml with these pip requirements; one that is there already is replaced. Comments are not kept.
    Raises EnvironmentProblem as `parse_spec` does."""
    parse_spec(spec_text)
    content: dict[str, Any] = yaml.safe_load(spec_text)
    added = {pip_dependency(text.strip(), line=0).name: text.strip() for text in packages}
    dependencies = content.get("dependencies") or []
    conda = [item for item in dependencies if not isinstance(item, dict)]
    pip = [str(text) for item in dependencies if isinstance(item, dict) for text in item["pip"] or []]
    kept = [text for text in pip if pip_dependency(text, line=0).name not in added]
    content["dependencies"] = [*conda, {"pip": [*kept, *added.values()]}]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    parse_spec(text)
    return text


def diff(lock_a: dict[str, Any], lock_b: dict[str, Any]) -> LockDiff:
    before, after = _versions(lock_a), _versions(lock_b)
    changes = [
        VersionChange(name, before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    return LockDiff(
        added=tuple(change for change in changes if change.before is None),
        removed=tuple(change for change in changes if change.after is None),
        changed=tuple(change for change in changes if change.before is not None and change.after is not None),
    )


def _versions(lock: dict[str, Any]) -> dict[str, str]:
    own = {package["name"]: package["version"] for package in (*lock.get("conda", ()), *lock["pip"])}
    return {"python": lock["python"], **lock["base"]["packages"], **own}
