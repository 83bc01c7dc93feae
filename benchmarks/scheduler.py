"""Heliostat's scheduler and five others on the public Philly trace and on a made-up mixed cluster, judged by the referee;
and whether Heliostat's decisions before a moment depend on durations of jobs that had not ended by then.

`python benchmarks/scheduler.py [philly] [mixed] [prefix] [--policies heliostat,slice]`; results merge into benchmarks/results/."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import hardware  # noqa: E402
from benchmarks.mixed_workload import Mix, changes_of, jobs_of, nodes_of, write_csv  # noqa: E402
from cluster.core.job import Priority  # noqa: E402
from cluster.core.kinds import matches  # noqa: E402
from cluster.simulation.engine import SPOT_GRACE_S, NodeChange  # noqa: E402
from cluster.simulation.opponents import POLICIES  # noqa: E402
from cluster.simulation.play import Setting, simulate  # noqa: E402
from cluster.simulation.trace import TraceJob, read_trace  # noqa: E402

SHARED = ROOT.parent / "shared"
TRACE = SHARED / "data" / "traces" / "philly.csv.gz"
REFEREE = SHARED / "tools" / "check_schedule.py"
RESULTS = ROOT / "benchmarks" / "results"
MOMENTS = 5
SEED = 20_171
HOUR_S = 3600.0

GATES = (
    ("p99_jct_h", 90.0),
    ("big_p95_first_start_h", 3.0),
    ("makespan_h", 2800.0),
    ("switch_share", 0.02),
    ("avg_jct_h", 6.3),
)
"""At most. Jain's index: within 0.02 of plain slices."""
GOAL_H, STRETCH_H, STRETCH_MAKESPAN_H = 6.0, 5.2, 2700.0

COLUMNS = (
    ("avg_jct_h", "avg JCT h", ".2f"),
    ("p50_jct_h", "p50 h", ".2f"),
    ("p99_jct_h", "p99 h", ".1f"),
    ("p95_first_start_s", "first start p95 s", ".0f"),
    ("big_p95_first_start_h", "8+ GPUs: first start p95 h", ".2f"),
    ("urgent_p95_first_start_s", "urgent: first start p95 s", ".0f"),
    ("makespan_h", "makespan h", ",.0f"),
    ("busy_while_waiting", "busy while work waits", ".1%"),
    ("switch_gpu_h", "switches GPU-h", ",.0f"),
    ("switch_share", "of useful", ".2%"),
    ("jain_tenant_slowdown", "Jain", ".3f"),
    ("worst_tenant_slowdown", "worst tenant", ".1f"),
    ("referee", "referee", ""),
    ("cpu_s", "CPU s", ",.0f"),
)


@dataclass(frozen=True)
class Work:
    """`file`: the trace as the referee reads it. `changes`: None, like nodes that stay."""

    name: str
    file: Path
    jobs: Sequence[TraceJob]
    nodes: int
    changes: Sequence[NodeChange] | None = None


def play(work: Work, policy: str, log: Path, until_s: float | None = None) -> float:
    """CPU seconds."""
    setting = Setting(nodes=work.nodes, policy=policy, log=log, until_s=until_s, changes=work.changes)
    before = time.process_time()
    simulate(work.jobs, setting)
    return time.process_time() - before


def judged(work: Work, log: Path) -> dict[str, Any]:
    """The referee's figures, and its verdict."""
    command = [sys.executable, str(REFEREE), str(work.file), str(log), "--nodes", str(work.nodes), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    figures: dict[str, Any] = json.loads(said.stdout) if said.stdout.startswith("{") else {}
    violations = said.stderr.strip().splitlines()
    return {**figures, "referee": "accepts" if said.returncode == 0 else "; ".join(violations) or "refuses"}


def measure(work: Work, policy: str, folder: Path) -> dict[str, Any]:
    log = folder / f"{work.name}-{policy}.jsonl"
    cpu_s = play(work, policy, log)
    row = {"policy": policy, **judged(work, log), "cpu_s": round(cpu_s, 1)}
    if work.changes is not None:
        row.update(own_checks(work, log))
    print(f"{work.name} {policy}: {row.get('avg_jct_h')} h, {row['referee']}", flush=True)
    return row


def own_checks(work: Work, log: Path) -> dict[str, Any]:
    """What the referee does not know: kinds, nodes that are gone, urgent jobs."""
    kinds = {change.node.name: change.node.kind for change in work.changes or ()}
    gone = _absences(work.changes or ())
    wrong = 0
    first: dict[int, float] = {}
    for line in log.read_text().splitlines():
        run = json.loads(line)
        job = work.jobs[run["job"]]
        first.setdefault(job.number, run["start"] - job.submitted_s)
        for name in run["nodes"]:
            bad_kind = bool(job.kinds) and not any(matches(asked, kinds[name]) for asked in job.kinds)
            wrong += bad_kind or any(run["start"] < back and run["end"] > left for left, back in gone.get(name, ()))
    urgent = sorted(first[job.number] for job in work.jobs if job.priority == Priority.URGENT)
    return {"urgent_p95_first_start_s": urgent[int(0.95 * len(urgent))], "wrong_kind_or_lost_node": wrong}


def _absences(changes: Sequence[NodeChange]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    left: dict[str, float] = {}
    for change in sorted(changes, key=lambda one: one.at_s):
        name = change.node.name
        if not change.comes:
            left[name] = change.at_s + SPOT_GRACE_S
        elif name in left:
            found.setdefault(name, []).append((left.pop(name), change.at_s))
    return found


def prefix_checks(work: Work, folder: Path, pool: Executor) -> list[dict[str, Any]]:
    """Other durations for all jobs unfinished at T: the runs that start before T must stay the same."""
    log = folder / f"{work.name}-heliostat.jsonl"
    if not log.exists():
        play(work, "heliostat", log)
    chance = random.Random(SEED)
    moments = sorted(chance.uniform(0, work.jobs[-1].submitted_s) for _ in range(MOMENTS))
    waiting = [pool.submit(prefix_check, work, log, at) for at in moments]
    rows = [one.result() for one in waiting]
    print(*rows, sep="\n", flush=True)
    return rows


def prefix_check(work: Work, log: Path, at: float) -> dict[str, Any]:
    ends: dict[int, float] = {}
    for line in log.read_text().splitlines():
        run = json.loads(line)
        ends[run["job"]] = run["end"]
    chance = random.Random(at)
    jobs = [changed(job, at, chance) if ends[job.number] > at else job for job in work.jobs]
    other = log.with_name(f"{work.name}-until-{at:.0f}.jsonl")
    play(replace(work, jobs=jobs), "heliostat", other, until_s=at)
    command = [sys.executable, str(REFEREE), str(work.file), str(log), "--prefix", str(other), "--until", str(at)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"until_h": round(at / HOUR_S, 1), "same": said.returncode == 0, "referee": said.stdout.strip()}


def changed(job: TraceJob, at: float, chance: random.Random) -> TraceJob:
    """Another duration; of one that may have run by then, a longer one."""
    return replace(job, duration_s=job.duration_s * chance.uniform(1 if job.submitted_s <= at else 0.1, 5) + 1)


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether Heliostat meets the numbers of its issue, in one run."""
    by_name = {row["policy"]: row for row in rows}
    ours, slices = by_name.get("heliostat"), by_name.get("slice")
    if ours is None:
        return []
    found = [{"gate": f"{name} ≤ {most:g}", "value": ours[name], "met": ours[name] <= most} for name, most in GATES]
    if slices is not None:
        least = round(slices["jain_tenant_slowdown"] - 0.02, 4)
        jain = ours["jain_tenant_slowdown"]
        found.append({"gate": f"jain_tenant_slowdown ≥ {least:g} (slice − 0.02)", "value": jain, "met": jain >= least})
    jct, makespan = ours["avg_jct_h"], ours["makespan_h"]
    found.append({"gate": f"goal: avg_jct_h ≤ {GOAL_H:g}", "value": jct, "met": jct <= GOAL_H})
    stretch = jct <= STRETCH_H and makespan <= STRETCH_MAKESPAN_H
    found.append({"gate": f"goal: avg_jct_h ≤ {STRETCH_H:g}, makespan_h ≤ 2,700", "value": jct, "met": stretch})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    lines = ["| policy | " + " | ".join(title for _, title, _ in columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = [format(row[name], spec) if name in row else "–" for name, _, spec in columns]
        lines.append(f"| {row['policy']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(found: dict[str, Any]) -> str:
    machine = found["hardware"]
    parts = [
        "# Scheduler\n",
        f"{machine['cpu']}, {machine['cores']} cores; load while measuring {machine['load']}; commit {machine['commit']}. "
        "Figures are the referee's (`shared/tools/check_schedule.py`); CPU s is the whole simulation of one policy on one core.\n",
    ]
    if "philly" in found:
        parts += ["## Philly: 82,247 jobs, 64 nodes × 8 GPUs, 30 s a switch\n", table(found["philly"]), ""]
        marks = [
            f"- {'met' if gate['met'] else '**missed**'}: {gate['gate']} ({gate['value']:g})" for gate in found["gates"]
        ]
        parts += ["Heliostat against its issue's numbers:\n", *marks, ""] if marks else []
    if "prefix" in found:
        parts.append("## It knows no duration before its job has ended\n")
        parts += [
            f"- durations of unfinished jobs changed at hour {row['until_h']:,}: {row['referee']}"
            for row in found["prefix"]
        ]
        parts.append("")
    if "mixed" in found:
        parts += [
            "## A mixed cluster, made up\n",
            "`benchmarks/mixed_workload.py`: A100, V100 and spot T4 nodes that go and come back; urgent jobs.\n",
            table(found["mixed"]),
            f"\nRuns on a wrong kind or a node that was gone: {sum(row['wrong_kind_or_lost_node'] for row in found['mixed'])}.\n",
        ]
    return "\n".join(parts) + "\n"


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = {row["policy"]: row for row in (*old, *new)}
    return [rows[policy] for policy in POLICIES if policy in rows]


def works(folder: Path) -> dict[str, Work]:
    mix = Mix()
    jobs = jobs_of(mix)
    write_csv(jobs, folder / "mixed.csv")
    return {
        "philly": Work("philly", TRACE, read_trace(TRACE), 64),
        "mixed": Work("mixed", folder / "mixed.csv", jobs, len(nodes_of(mix)), changes_of(mix)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["mixed", "philly", "prefix"])
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--folder", type=Path, help="Keep the logs here.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Simulations at a time.")
    args = parser.parse_args()
    if not (TRACE.exists() and REFEREE.exists()):
        sys.exit(f"the trace and its referee are not here: {TRACE}, {REFEREE}")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(args.workers) as pool:
        run(args.parts, args.policies.split(","), args.folder or Path(scratch), pool)


def run(parts: list[str], policies: list[str], folder: Path, pool: Executor) -> None:
    file = RESULTS / "scheduler.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    known = works(folder)
    for part in parts:
        found["hardware"] = hardware()
        if part == "prefix":
            found["prefix"] = prefix_checks(known["philly"], folder, pool)
        else:
            for one in as_completed([pool.submit(measure, known[part], policy, folder) for policy in policies]):
                found[part] = merged(found.get(part, []), [one.result()])
                found["gates"] = gates(found.get("philly", []))
                _write(file, found)
        _write(file, found)
    print(report(found))


def _write(file: Path, found: dict[str, Any]) -> None:
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    file.with_suffix(".md").write_text(report(found))


if __name__ == "__main__":
    main()
