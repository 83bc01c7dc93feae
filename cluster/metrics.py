"""What operators watch of the scheduler, for Prometheus through Ray's own exporter. Labels name tenants, never jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ray.util.metrics import Counter, Gauge, Histogram

WAITS_S = [0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600]


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


class RayWatch:
    """To be made in a process of Ray's; told from one thread."""

    def __init__(self) -> None:
        waits = "From when a job was queued, or had to give way, until it got its slots."
        self._waits = Histogram("heliostat_job_queue_wait_seconds", waits, WAITS_S, ("tenant",))
        switches = "Orders to give way that were written, and jobs that went on after one."
        self._switches = Counter("heliostat_switches_total", switches, ("tenant", "how"))
        self._jobs = Gauge("heliostat_jobs", "Jobs that wait for slots or hold some.", ("tenant", "status"))
        self._shown: dict[tuple[str, str], int] = {}

    def waited(self, tenant: str, seconds: float) -> None:
        self._waits.observe(seconds, {"tenant": tenant})

    def switched(self, tenant: str, how: str) -> None:
        self._switches.inc(1, {"tenant": tenant, "how": how})

    def jobs(self, counts: Mapping[tuple[str, str], int]) -> None:
        """What is gone is shown as 0 from then on."""
        then = {**dict.fromkeys(self._shown, 0), **counts}
        for (tenant, status), count in then.items():
            if self._shown.get((tenant, status)) != count:
                self._jobs.set(count, {"tenant": tenant, "status": status})
        self._shown = then
