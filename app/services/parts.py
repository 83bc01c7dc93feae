"""What the services work with. No web framework and no Ray: rows, objects, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from app.db.session import Database
from app.services.changes import Changes
from app.settings import Settings
from cluster.errors import HeliostatError
from cluster.ports import CheckedEnvironment
from cluster.storage.objects import ObjectStore


class SolvedEnvironment(Protocol):
    """What `runtime_envs.lock.solve` returns."""

    @property
    def lock(self) -> dict[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def dependency_md5(self) -> str: ...


CheckEnvironment = Callable[[str, bool], Mapping[str, CheckedEnvironment | HeliostatError]]
"""(fingerprint, whether to repair) → by node that has it; blocking."""


@dataclass(frozen=True)
class Parts:
    settings: Settings
    database: Database
    storage: ObjectStore
    changes: Changes
    solve: Callable[[str], SolvedEnvironment]
    """environment.yml → lock; seconds, blocking."""
    check_environment: CheckEnvironment
