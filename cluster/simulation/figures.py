"""How good a schedule is: the referee's figures, worked out from the runs as they come."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.core.fairness import jain
from cluster.simulation.engine import Run
from cluster.simulation.trace import TraceJob

HOUR_S = 3600.0
SHORTEST_S = 60.0
"""Slowdown is measured against at least so long a duration."""
MANY = 100
"""Tenants with fewer jobs are left out of fairness, unless all have fewer."""


@dataclass
class Fate:
    first_s: float
    end_s: float
    runs: int = 1


class Figures:
    """`slots_per_node`: gangs of so many and more are the big ones; `slots`: of the whole cluster."""

    def __init__(self, jobs: Sequence[TraceJob], slots_per_node: int, slots: int, switch_cost_s: float) -> None:
        self._jobs = jobs
        self._slots_per_node = slots_per_node
        self._slots = slots
        self._switch_cost_s = switch_cost_s
        self._fates: dict[int, Fate] = {}

    def add(self, run: Run) -> None:
        fate = self._fates.get(run.number)
        if fate is None:
            self._fates[run.number] = Fate(run.start_s, run.end_s)
        else:
            fate.end_s, fate.runs = run.end_s, fate.runs + 1

    def as_dict(self) -> dict[str, float]:
        """Of jobs that ran; times in the unit that the name ends with."""
        ran = [(job, self._fates[job.number]) for job in self._jobs if job.number in self._fates]
        if not ran:
            return {"jobs": 0}
        jct = [fate.end_s - job.submitted_s for job, fate in ran]
        first = [fate.first_s - job.submitted_s for job, fate in ran]
        big = [fate.first_s - job.submitted_s for job, fate in ran if job.slots >= self._slots_per_node]
        useful = sum(job.duration_s * job.slots for job, _ in ran)
        switches = sum(fate.runs - 1 for _, fate in ran)
        switch_s = sum((fate.runs - 1) * job.slots for job, fate in ran) * self._switch_cost_s
        makespan = max(fate.end_s for _, fate in ran)
        slowdowns = self._slowdowns(ran)
        return {
            "jobs": len(ran),
            "avg_jct_h": sum(jct) / len(jct) / HOUR_S,
            "p50_jct_h": quantile(jct, 0.5) / HOUR_S,
            "p95_jct_h": quantile(jct, 0.95) / HOUR_S,
            "p99_jct_h": quantile(jct, 0.99) / HOUR_S,
            "p95_first_start_s": quantile(first, 0.95),
            "big_p95_first_start_h": quantile(big, 0.95) / HOUR_S,
            "makespan_h": makespan / HOUR_S,
            "utilisation": useful / (self._slots * makespan) if makespan else math.nan,
            "switches_per_job": switches / len(ran),
            "switch_gpu_h": switch_s / HOUR_S,
            "switch_share": switch_s / useful if useful else math.nan,
            "jain_tenant_slowdown": jain(slowdowns),
            "worst_tenant_slowdown": max(slowdowns),
        }

    def _slowdowns(self, ran: list[tuple[TraceJob, Fate]]) -> list[float]:
        """The mean of each tenant."""
        found: dict[str, list[float]] = defaultdict(list)
        for job, fate in ran:
            found[job.tenant].append((fate.end_s - job.submitted_s) / max(job.duration_s, SHORTEST_S))
        many = [values for values in found.values() if len(values) >= MANY]
        return [sum(values) / len(values) for values in many or found.values()]


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan
