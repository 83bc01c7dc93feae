"""What operators want to see of the scheduler. Labels name tenants, never jobs. Without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Watch(Protocol):
    """`status`: queued, running or parked. `how`: park, suspend or resume."""

    def waited(self, tenant: str, seconds: float) -> None: ...

    def switched(self, tenant: str, how: str) -> None: ...

    def jobs(self, counts: Mapping[tuple[str, str], int]) -> None:
        """(tenant, status) → how many now."""
        ...


class Unwatched:
    """Where there is no Ray."""

    def waited(self, tenant: str, seconds: float) -> None: ...

    def switched(self, tenant: str, how: str) -> None: ...

    def jobs(self, counts: Mapping[tuple[str, str], int]) -> None: ...
