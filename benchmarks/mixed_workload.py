"""A made-up cluster and its jobs, from a seed: three kinds of GPUs, urgent jobs, and spot nodes that go and come back.

Durations are log-normal with a heavy tail; tenants submit in bursts, by day. Nothing of it is fitted to Philly."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cluster.core.job import Node, Priority
from cluster.simulation.engine import SPOT_GRACE_S, NodeChange
from cluster.simulation.trace import TraceJob

T = TypeVar("T")
HOUR_S = 3600.0
SLOTS_PER_NODE = 8


@dataclass(frozen=True)
class Mix:
    """`load`: what is asked for, as a share of all GPU-hours until the last submission."""

    seed: int = 4
    jobs: int = 12_000
    hours: float = 21 * 24.0
    load: float = 0.95
    tenants: int = 12
    nodes: tuple[tuple[str, float, int, str], ...] = (
        ("A100-80GB", 80.0, 12, "on_demand"),
        ("V100-32GB", 32.0, 12, "on_demand"),
        ("T4", 16.0, 8, "spot"),
    )
    """Kind, GiB, how many, market."""
    spot_life_h: float = 36.0
    spot_gone_h: float = 2.0


PRIORITIES = ((Priority.URGENT, 0.04), (Priority.HIGH, 0.10), (Priority.NORMAL, 0.71), (Priority.LOW, 0.15))
GANGS = ((1, 0.70), (2, 0.12), (4, 0.10), (8, 0.06), (16, 0.02))
ASKED = (((), 0.55), (("A100",), 0.25), (("V100",), 0.12), (("T4",), 0.08))


def nodes_of(mix: Mix) -> list[Node]:
    kinds = [(kind, memory_gb, market) for kind, memory_gb, count, market in mix.nodes for _ in range(count)]
    return [
        Node(str(number), kind, SLOTS_PER_NODE, memory_gb, market=market)
        for number, (kind, memory_gb, market) in enumerate(kinds)
    ]


def changes_of(mix: Mix) -> list[NodeChange]:
    """Spot nodes go and come back until twice the time of the submissions; then all stay."""
    chance = random.Random(mix.seed + 1)
    changes = []
    for node in nodes_of(mix):
        changes.append(NodeChange(0.0, node, True))
        at = 0.0
        while node.market == "spot":
            at += chance.expovariate(1 / (mix.spot_life_h * HOUR_S))
            if at > 2 * mix.hours * HOUR_S:
                break
            changes.append(NodeChange(at, node, False))
            at += 2 * SPOT_GRACE_S + chance.expovariate(1 / (mix.spot_gone_h * HOUR_S))
            changes.append(NodeChange(at, node, True))
    return changes


def jobs_of(mix: Mix) -> list[TraceJob]:
    chance = random.Random(mix.seed)
    habits = [(math.log(chance.uniform(300, 6000)), chance.uniform(0.8, 1.8)) for _ in range(mix.tenants)]
    loud = [1 / (rank + 1) for rank in range(mix.tenants)]
    drawn: list[TraceJob] = []
    while len(drawn) < mix.jobs:
        tenant = chance.choices(range(mix.tenants), loud)[0]
        at = _daytime(chance, mix.hours)
        for _ in range(min(mix.jobs - len(drawn), 1 + int(chance.expovariate(1 / 3)))):
            at += chance.expovariate(1 / 60)
            drawn.append(_job(chance, habits[tenant], f"tenant-{tenant:02d}", at))
    return _scaled(sorted(drawn, key=lambda job: job.submitted_s), mix)


def _daytime(chance: random.Random, hours: float) -> float:
    """Four of five bursts between 8 and 20 o'clock."""
    day = chance.randrange(max(1, int(hours // 24)))
    hour = chance.uniform(8, 20) if chance.random() < 0.8 else chance.uniform(0, 24)
    return (24 * day + hour) * HOUR_S


def _job(chance: random.Random, habit: tuple[float, float], tenant: str, at: float) -> TraceJob:
    slots = _pick(chance, GANGS)
    tail = 1.0 if chance.random() < 0.9 else chance.paretovariate(1.3)
    duration = min(200 * HOUR_S, max(10.0, chance.lognormvariate(*habit) * tail * (1 + math.log2(slots))))
    return TraceJob(0, at, duration, slots, tenant, _pick(chance, PRIORITIES), _pick(chance, ASKED))


def _pick(chance: random.Random, pairs: tuple[tuple[T, float], ...]) -> T:
    return chance.choices([value for value, _ in pairs], [weight for _, weight in pairs])[0]


def _scaled(jobs: list[TraceJob], mix: Mix) -> list[TraceJob]:
    """Durations stretched so that the load is as asked; seconds counted from the first job."""
    slots = SLOTS_PER_NODE * len(nodes_of(mix))
    stretch = mix.load * slots * mix.hours * HOUR_S / sum(job.duration_s * job.slots for job in jobs)
    return [
        TraceJob(
            number,
            round(job.submitted_s - jobs[0].submitted_s, 3),
            round(job.duration_s * stretch, 3),
            job.slots,
            job.tenant,
            job.priority,
            job.kinds,
        )
        for number, job in enumerate(jobs)
    ]


def write_csv(jobs: list[TraceJob], path: Path) -> None:
    """As `read_trace` and the referee read it."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("timestamp", "duration", "num_gpus", "cluster", "priority", "gpu_type"))
        for job in jobs:
            kind = job.kinds[0] if job.kinds else ""
            rows.writerow((job.submitted_s, job.duration_s, job.slots, job.tenant, job.priority.value, kind))
