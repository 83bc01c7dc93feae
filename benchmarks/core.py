"""How fast the scheduler's state machine decides: 100,000 waiting jobs, 5,000 nodes of 8 slots, 1,000 tenants. CPU time of one
process, without a database: each event (a node joins, a job ends, a job comes, a look by the clock) is applied and decided
on, and what was decided is applied at once. Writes benchmarks/results/core.json."""

from __future__ import annotations

import argparse
import heapq
import json
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.hardware import hardware
from cluster.core.events import (
    Decision,
    Event,
    Grant,
    JobGranted,
    JobQueued,
    JobReleased,
    JobYielding,
    NodeJoined,
    Resume,
    TenantSet,
    Yield,
)
from cluster.core.job import Job, Node, Priority, Shape, TenantShare
from cluster.core.state import ClusterState

KINDS = [("H100-80GB", 80.0), ("A100-80GB", 80.0), ("A100-40GB", 40.0), ("L40S", 48.0), ("T4", 15.0)]
GANGS, WEIGHTS = [1, 2, 4, 8, 16, 32], [60, 12, 10, 12, 4, 2]
ASKED = [(), (), ("A100",), ("H100",), ("A100-80GB", "H100"), ("L40S", "A100-40GB")]
MODELS = [f"model-{number}" for number in range(40)]
BATCH = 50
RESULT = Path(__file__).parent / "results" / "core.json"


@dataclass
class Figures:
    """`decide_ms`: of each decide after one event. `cpu_s`: applying and deciding together."""

    placements: int = 0
    yields: int = 0
    events: int = 0
    cpu_s: float = 0.0
    decide_ms: list[float] = field(default_factory=list)

    def shown(self) -> dict[str, float]:
        times = sorted(self.decide_ms)
        return {
            "events": self.events,
            "placements": self.placements,
            "yields": self.yields,
            "cpu_s": round(self.cpu_s, 2),
            "placements_per_s": round(self.placements / self.cpu_s, 1),
            "placements_and_yields_per_s": round((self.placements + self.yields) / self.cpu_s, 1),
            "decide_p50_ms": round(times[len(times) // 2], 3),
            "decide_p99_ms": round(times[int(0.99 * len(times))], 3),
            "decide_max_ms": round(times[-1], 3),
        }


class Bench:
    def __init__(self, nodes: int, tenants: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.state = ClusterState()
        self.now = 0.0
        self.tenants = [f"tenant-{number}" for number in range(tenants)]
        self.figures = Figures()
        self._ends: list[tuple[float, str, int]] = []
        self._runs: dict[str, float] = {}
        self._jobs = 0
        self._nodes = nodes

    def entitle(self) -> None:
        for number, name in enumerate(self.tenants):
            limit = 60 if number % 5 == 0 else None
            share = TenantShare(name, 1.0 + number % 3, 8 if number % 10 == 0 else 0, limit)
            self.state.apply(TenantSet(share))

    def fill_line(self, count: int) -> None:
        for _ in range(count):
            self.state.apply(JobQueued(self.job()))

    def job(self) -> Job:
        draw, number = self.random, self._jobs
        self._jobs += 1
        slots = draw.choices(GANGS, WEIGHTS)[0]
        shape = Shape(slots, draw.choice([10.0, 14.5, 30.0, 70.0]), draw.choice(ASKED), max(1, slots // 8))
        self._runs[f"job-{number}"] = min(draw.lognormvariate(6.0, 1.6), 2e5)
        priority = draw.choices(list(Priority), [1, 4, 85, 10])[0]
        tenant = self.tenants[min(int(draw.paretovariate(0.6)) - 1, len(self.tenants) - 1)]
        return Job(f"job-{number}", tenant, shape, self.now, priority, model=draw.choice(MODELS))

    def nodes(self) -> Iterator[Node]:
        for number in range(self._nodes):
            kind, memory = KINDS[number % len(KINDS)]
            cached = frozenset(self.random.sample(MODELS, 4))
            yield Node(f"node-{number:05d}", kind, 8, memory, models=cached)

    # One event ----------------------------------------------------------------------------------------------------

    def step(self, *events: Event) -> None:
        """The events, one decision, and what follows from it."""
        figures, began = self.figures, time.process_time()
        for event in events:
            self.state.apply(event)
        asked = time.process_time()
        decisions = self.state.decide(self.now)
        figures.decide_ms.append((time.process_time() - asked) * 1e3)
        for decision in decisions:
            self._carry_out(decision)
        figures.cpu_s += time.process_time() - began
        figures.events += 1

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Grant(job, placement, _):
                attempt, left = job.attempt + 1, self._runs[job.id] - job.attained_s
                self.state.apply(JobGranted(job, attempt, placement, self.now))
                heapq.heappush(self._ends, (self.now + max(left, 1.0), job.id, attempt))
                self.figures.placements += 1
            case Yield(job_id, attempt, how, _):
                held = self.state.facts.held[job_id, attempt]
                job = replace(held.job, attempt=attempt, queued_at=self.now, attained_s=held.attained_s(self.now))
                self.state.apply(JobYielding(job_id, attempt, how))
                self.state.apply(JobReleased(job_id, attempt))
                self.state.apply(JobQueued(job))
                self.figures.yields += 1
            case Resume():
                raise AssertionError("nobody parks here")

    def next_end(self) -> Event:
        while True:
            at, job_id, attempt = heapq.heappop(self._ends)
            if (job_id, attempt) in self.state.facts.held:
                self.now = max(self.now, at)
                return JobReleased(job_id, attempt)

    def shown(self) -> dict[str, float]:
        """What was measured since the last call."""
        figures, self.figures = self.figures, Figures()
        return figures.shown()

    def run(self, ends: int) -> None:
        """Jobs end and others come, so that the line keeps its length."""
        for number in range(ends):
            self.step(self.next_end())
            self.step(JobQueued(self.job()))
            if number % 50 == 0:
                self.step()

    def run_batches(self, batches: int, ends: int) -> None:
        """As a busy scheduler works: so many jobs end and come between two rounds."""
        for _ in range(batches):
            events = [event for _ in range(ends) for event in (self.next_end(), JobQueued(self.job()))]
            self.step(*events)


def _bench(args: argparse.Namespace) -> tuple[Bench, dict[str, object]]:
    bench = Bench(args.nodes, args.tenants, args.seed)
    bench.entitle()
    began = time.process_time()
    bench.fill_line(args.jobs)
    queueing = round((time.process_time() - began) / args.jobs * 1e6, 1)
    return bench, {"asked": vars(args), "queueing_us_a_job": queueing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--tenants", type=int, default=1000)
    parser.add_argument("--ends", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    bench, report = _bench(args)
    bench.step(*(NodeJoined(node) for node in bench.nodes()))
    report["all nodes join, one round"] = bench.shown()
    bench.run(args.ends)
    report["a round after each event"] = bench.shown()
    bench.run_batches(args.ends // BATCH, BATCH)
    report[f"{BATCH} jobs end and come between two rounds"] = bench.shown()
    joining, _ = _bench(args)
    for node in joining.nodes():
        joining.step(NodeJoined(node))
    report["nodes join one by one"] = joining.shown()
    report["waiting"] = len(bench.state.facts.waiting)
    report["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    report["hardware"] = hardware()
    print(json.dumps(report, indent=1))
    if not args.no_record:
        RESULT.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
