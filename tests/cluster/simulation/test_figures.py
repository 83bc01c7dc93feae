"""Figures of a schedule that is small enough to work them out by hand, and the same as the referee's."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.simulation.engine import Run
from cluster.simulation.figures import Figures, quantile
from cluster.simulation.play import Setting, simulate
from cluster.simulation.trace import TraceJob, read_trace

REFEREE = Path(__file__).resolve().parents[4] / "shared" / "tools" / "check_schedule.py"


def test_by_hand() -> None:
    jobs = [TraceJob(0, 0.0, 3600.0, 8, "a"), TraceJob(1, 0.0, 3600.0, 1, "b")]
    figures = Figures(jobs, 8, 16, 30.0)
    figures.add(Run(0, 0.0, 3600.0, {"0": 8}))
    figures.add(Run(1, 1800.0, 3600.0, {"1": 1}))
    figures.add(Run(1, 7200.0, 9030.0, {"0": 1}))
    found = figures.as_dict()
    assert found["avg_jct_h"] == pytest.approx((1 + 9030 / 3600) / 2)
    assert found["makespan_h"] == pytest.approx(9030 / 3600)
    assert found["big_p95_first_start_h"] == 0 and found["p95_first_start_s"] == 1800
    assert found["switch_gpu_h"] == pytest.approx(30 / 3600) and found["switches_per_job"] == 0.5
    assert found["worst_tenant_slowdown"] == pytest.approx(9030 / 3600)
    assert found["utilisation"] == pytest.approx(9 * 3600 / (16 * 9030))


def test_nothing_ran() -> None:
    assert Figures([TraceJob(0, 0.0, 1.0, 1, "a")], 8, 8, 30.0).as_dict() == {"jobs": 0}


def test_quantile() -> None:
    assert quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 3.0 and quantile([1.0], 0.99) == 1.0


@pytest.mark.skipif(not REFEREE.exists(), reason="the referee is not beside this checkout")
@pytest.mark.parametrize("policy", ["heliostat", "slice"])
def test_the_referee_accepts_and_finds_the_same(policy: str, tmp_path: Path) -> None:
    trace, log = tmp_path / "trace.csv", tmp_path / "log.jsonl"
    with trace.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("timestamp", "duration", "num_gpus", "cluster"))
        rows.writerows((at * 97, 400 + at * 61 % 2000, (1, 8, 2, 12)[at % 4], "ab"[at % 2]) for at in range(40))
    ours = simulate(read_trace(trace), Setting(nodes=2, policy=policy, log=log))
    command = [sys.executable, str(REFEREE), str(trace), str(log), "--nodes", "2", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(said.stdout)
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, abs=1e-3)
