"""What operators watch, for Prometheus through Ray's own exporter. To be made in a process of Ray's."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.environment_checks import Note
from cluster.ports import EnvironmentCheck

WAITS_S = [0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600]


class RayWatch:
    """`cluster.watch.Watch`; told from one thread."""

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


def environment_counters(node: str) -> Note:
    """Counts checks of environments, and those that found changed files."""
    checks = Counter(
        "heliostat_environment_checks_total", "Checks of environments on a node.", tag_keys=("node", "kind", "status")
    )
    corruptions = Counter(
        "heliostat_environment_corruptions_total", "Checks that found changed files.", tag_keys=("node",)
    )

    def note(check: EnvironmentCheck) -> None:
        checks.inc(tags={"node": node, "kind": check.kind, "status": check.status})
        if check.status in ("damaged", "repaired"):
            corruptions.inc(tags={"node": node})

    return note
