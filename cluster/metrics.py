"""Metrics of a node, through Ray's: Prometheus reads them from the node's own listener."""

from __future__ import annotations

from ray.util.metrics import Counter

from cluster.environment_checks import Note
from cluster.ports import EnvironmentCheck


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
