"""`heliostat simulate`: no service, a table or JSON, a log, errors with the place to look at."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from cli_said import Run

ROWS = "timestamp,duration,num_gpus,cluster\n0,1000,8,a\n10,200,8,b\n20,50,1,b\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "jobs.csv.gz"
    path.write_bytes(gzip.compress(ROWS.encode()))
    return path


def test_figures_and_a_log(offline: Run, trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.jsonl"
    said = offline("simulate", str(trace), "--nodes", "1", "--policy", "fifo", "--log", str(log), "--json")
    assert said.code == 0 and said.err == ""
    assert said.json["policy"] == "fifo" and said.json["jobs"] == 3
    assert said.json["makespan_h"] == pytest.approx(1250 / 3600)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    assert runs[0] == {"job": 0, "start": 0.0, "end": 1000.0, "nodes": {"0": 8}}


def test_the_default_is_heliostat_and_a_table(offline: Run, trace: Path) -> None:
    said = offline("simulate", str(trace), "--nodes", "1", "--switch-cost", "5")
    assert said.code == 0 and "HELIOSTAT" in said.out and "avg_jct_h" in said.out


def test_until_cuts_the_log(offline: Run, trace: Path, tmp_path: Path) -> None:
    log = tmp_path / "out.jsonl.gz"
    offline("simulate", str(trace), "--nodes", "1", "--policy", "fifo", "--log", str(log), "--until", "500")
    (run,) = [json.loads(line) for line in gzip.decompress(log.read_bytes()).splitlines()]
    assert (run["job"], run["start"]) == (0, 0.0) and 500 < run["end"] < 500.001


@pytest.mark.parametrize(
    ("arguments", "param"),
    [(["--policy", "lottery"], "--policy"), (["--gpus-per-node", "4", "--nodes", "1"], "--nodes")],
)
def test_wrong_use(offline: Run, trace: Path, arguments: list[str], param: str) -> None:
    said = offline("simulate", str(trace), *arguments, "--json")
    assert said.code == 2 and json.loads(said.err)["error"]["param"] == param


def test_a_trace_that_cannot_be_read(offline: Run, tmp_path: Path) -> None:
    broken = tmp_path / "jobs.csv"
    broken.write_text(ROWS + "30,soon,1,a\n")
    said = offline("simulate", str(broken), "--json")
    assert said.code == 2 and "line 5" in json.loads(said.err)["error"]["message"]
