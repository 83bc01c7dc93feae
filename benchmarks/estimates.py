"""How good finish estimates are on the Philly trace: coverage and pinball loss of P50 and P80 of a job's run time, foretold
when it is submitted, beside the quantiles of its tenant's own history.

Two protocols, judged on the second half of the trace. `online`: as the service does it, every job that has ended by then
has been learnt from; the constants were chosen on the first half. `frozen`: nothing of the second half is ever learnt.
A job ends `duration` after its submission, or, with --log (of `heliostat simulate`), when that schedule ended it."""

from __future__ import annotations

import argparse
import csv
import gzip
import heapq
import json
import math
import sys
import time
from bisect import insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import hardware  # noqa: E402
from cluster.core.estimates import Estimator, Traits, quantile  # noqa: E402

TRACE = ROOT.parent / "shared" / "data" / "traces" / "philly.csv.gz"
RESULTS = ROOT / "benchmarks" / "results"
QUANTILES = (0.5, 0.8)
RECENT = 100
COVERED = (0.75, 0.85)
AGES_H = (0.1, 1.0, 10.0)
"""Running jobs are judged too: the time that is left, foretold when they have run for so long."""


PROTOCOLS = (
    "`online` is what the service does and what counts: each forecast is made when the job is submitted, from the jobs that have "
    "ended by then; the constants were chosen on the first half. `frozen` learns nothing of the second half: habits that changed "
    "in between (tenants ed69ec and 7f04ca, 1,386 jobs) make a quarter of its P50 loss, and the tenant's own history does better at "
    "P50 there."
)


@dataclass(frozen=True)
class Run:
    id: str
    traits: Traits
    submitted_s: float
    run_s: float
    ended_s: float


@dataclass
class Score:
    """Of one forecaster: how many, how often the truth lay below each quantile, and the mean pinball loss."""

    jobs: int = 0
    below: list[int] = field(default_factory=lambda: [0] * len(QUANTILES))
    loss_s: list[float] = field(default_factory=lambda: [0.0] * len(QUANTILES))
    log_loss: list[float] = field(default_factory=lambda: [0.0] * len(QUANTILES))

    def add(self, truth_s: float, said_s: Sequence[float]) -> None:
        self.jobs += 1
        for at, (q, said) in enumerate(zip(QUANTILES, said_s, strict=True)):
            self.below[at] += truth_s <= said
            self.loss_s[at] += pinball(q, truth_s, said)
            self.log_loss[at] += pinball(q, math.log(truth_s), math.log(max(said, 1.0)))

    def figures(self) -> dict[str, Any]:
        many = max(self.jobs, 1)
        return {
            "jobs": self.jobs,
            "covered": [round(count / many, 4) for count in self.below],
            "pinball_h": [round(loss / many / 3600, 4) for loss in self.loss_s],
            "pinball_log": [round(loss / many, 4) for loss in self.log_loss],
        }


def pinball(q: float, truth: float, said: float) -> float:
    return q * (truth - said) if truth >= said else (1 - q) * (said - truth)


def read_trace(path: Path, log: Path | None) -> list[Run]:
    """In the order of submission, as the referee numbers them."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = [
            (_seconds(row["timestamp"]), float(row["duration"]), int(float(row["num_gpus"])), row["cluster"])
            for row in csv.DictReader(file)
        ]
    rows.sort(key=lambda row: row[0])
    ends = _ends(log) if log else {}
    return [
        Run(str(number), Traits(tenant, gpus), at - rows[0][0], run_s, ends.get(number, at - rows[0][0] + run_s))
        for number, (at, run_s, gpus, tenant) in enumerate(rows)
    ]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def _ends(log: Path) -> dict[int, float]:
    ends: dict[int, float] = {}
    with gzip.open(log, "rt") if log.suffix == ".gz" else log.open() as file:
        for line in file:
            run = json.loads(line)
            ends[run["job"]] = max(run["end"], ends.get(run["job"], 0.0))
    return ends


class History:
    """The opponent: quantiles of what the tenant's own jobs took, of all and of the most recent ones."""

    def __init__(self) -> None:
        self._all: dict[str, list[float]] = {}
        self._recent: dict[str, deque[float]] = {}

    def learn(self, run: Run) -> None:
        insort(self._all.setdefault(run.traits.tenant, []), run.run_s)
        self._recent.setdefault(run.traits.tenant, deque(maxlen=RECENT)).append(run.run_s)

    def quantiles(self, tenant: str) -> dict[str, list[float]]:
        if tenant not in self._all:
            return {}
        recent = sorted(self._recent[tenant])
        return {"tenant history": _quantiles(self._all[tenant]), f"tenant's last {RECENT}": _quantiles(recent)}


def _quantiles(ordered: Sequence[float]) -> list[float]:
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in QUANTILES]


def moments(runs: Sequence[Run], frozen: bool) -> Iterator[tuple[Run, bool]]:
    """Submissions and ends (True) in the order of time; frozen: no end after the first half was submitted."""
    running: list[tuple[float, int]] = []
    half = len(runs) // 2
    for number, run in enumerate(runs):
        while running and running[0][0] <= run.submitted_s and not (frozen and number >= half):
            yield runs[heapq.heappop(running)[1]], True
        yield run, False
        heapq.heappush(running, (run.ended_s, number))


def judge(runs: Sequence[Run], frozen: bool) -> dict[str, Any]:
    """Only jobs that the opponent has an answer for count, for all alike."""
    estimator, history = Estimator(), History()
    scores: dict[str, Score] = {}
    tenants: dict[str, Score] = {}
    ages = {f"after {age:g} h": Score() for age in AGES_H}
    began = time.process_time()
    for run, ended in moments(runs, frozen):
        if ended:
            estimator.learn(run.traits, run.run_s, run.id)
            history.learn(run)
            continue
        outlook = estimator.outlook(run.traits, job_id=run.id)
        theirs = history.quantiles(run.traits.tenant)
        if int(run.id) < len(runs) // 2 or not theirs:
            continue
        ours = [quantile(outlook, q) or 0.0 for q in QUANTILES]
        for name, said in {"heliostat": ours, **theirs}.items():
            scores.setdefault(name, Score()).add(run.run_s, said)
        tenants.setdefault(run.traits.tenant, Score()).add(run.run_s, ours)
        _judge_ages(estimator, run, ages)
    return {
        "forecasters": {name: score.figures() for name, score in scores.items()},
        "tenants": {name: score.figures() for name, score in sorted(tenants.items(), key=lambda one: -one[1].jobs)},
        "left": {name: score.figures() for name, score in ages.items()},
        "us_a_job": round((time.process_time() - began) / len(runs) * 1e6),
    }


def _judge_ages(estimator: Estimator, run: Run, ages: dict[str, Score]) -> None:
    for age_h, score in zip(AGES_H, ages.values(), strict=True):
        ran_s = age_h * 3600
        if run.run_s > ran_s:
            outlook = estimator.outlook(run.traits, attained_s=ran_s)
            score.add(run.run_s - ran_s, [quantile(outlook, q, ran_s) or 0.0 for q in QUANTILES])


def met(result: dict[str, Any]) -> bool:
    """P80 covers 75–85 %, and both pinball losses lie below those of the tenant's own history."""
    found = result["forecasters"]
    ours = found["heliostat"]
    others = [figures["pinball_h"] for name, figures in found.items() if name != "heliostat"]
    better = all(ours["pinball_h"][at] < other[at] for other in others for at in range(len(QUANTILES)))
    return COVERED[0] <= ours["covered"][1] <= COVERED[1] and better


def table(results: dict[str, dict[str, Any]], about: dict[str, Any]) -> str:
    lines = ["# Finish estimates on the Philly trace, second half", "", about["note"], "", PROTOCOLS, ""]
    for protocol, result in results.items():
        verdict = "met" if result["met"] else "not met"
        lines += [
            f"## {protocol}: {verdict}",
            "",
            "| forecaster | jobs | below P50 | below P80 | pinball P50, h | P80, h | of logs: P50 | P80 |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(name, figures) for name, figures in result["forecasters"].items()),
            "",
            "Time left of jobs that have run for a while, and coverage by tenant:",
            "",
            "| | jobs | below P50 | below P80 | pinball P50, h | P80, h | of logs: P50 | P80 |",
            "|---|---|---|---|---|---|---|---|",
            *(_row(name, figures) for name, figures in result["left"].items()),
            *(_row(f"tenant {name}", figures) for name, figures in result["tenants"].items()),
            "",
            f"{result['us_a_job']} µs of CPU a job, this table's other rows included.",
            "",
        ]
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> str:
    covered = [f"{share:.1%}" for share in figures["covered"]]
    losses = [f"{loss:.3f}" for loss in (*figures["pinball_h"], *figures["pinball_log"])]
    return f"| {name} | {figures['jobs']} | {' | '.join(covered)} | {' | '.join(losses)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--log", type=Path, help="a schedule, for the moments at which jobs end")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.trace.exists():
        print(f"no trace at {args.trace}: name one with --trace", file=sys.stderr)
        return 2
    runs = read_trace(args.trace, args.log)
    results = {}
    for protocol in ("online", "frozen"):
        results[protocol] = judge(runs, frozen=protocol == "frozen")
        results[protocol]["met"] = met(results[protocol])
    machine = hardware()
    ends = "the schedule's ends" if args.log else "ends as if no job had waited"
    note = f"{len(runs)} jobs, {ends}; {machine['cpu']}, {machine['cores']} cores, load {machine['load']}, commit {machine['commit']}"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "estimates.json").write_text(
        json.dumps({"note": note, "hardware": machine, **results}, indent=1) + "\n"
    )
    (args.results / "estimates.md").write_text(table(results, {"note": note}))
    print(table(results, {"note": note}))
    return 0 if results["online"]["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
