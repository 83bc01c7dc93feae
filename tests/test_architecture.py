"""The rules of the architecture are tests: a seeded violation of each import contract is found, files stay short."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("app", "cluster", "runtime_envs", "trainers")
MOST_LINES = 400

VIOLATIONS = [
    ("cluster/agent.py", "import app.settings", "app over trainers over cluster and runtime_envs"),
    ("cluster/agent.py", "import runtime_envs.lock", "app over trainers over cluster and runtime_envs"),
    ("runtime_envs/lock.py", "import cluster.errors", "app over trainers over cluster and runtime_envs"),
    ("trainers/run/driver.py", "import app.settings", "app over trainers over cluster and runtime_envs"),
    ("cluster/core/state.py", "import time", "cluster.core is pure: no Ray, clock, randomness, I/O, logging"),
    ("cluster/core/state.py", "import ray", "cluster.core is pure: no Ray, clock, randomness, I/O, logging"),
    ("runtime_envs/spec.py", "import subprocess", "runtime_envs.spec is pure"),
    ("trainers/child/data.py", "import ray", "the child imports nothing of the house"),
    ("trainers/child/data.py", "import cluster.errors", "the child imports nothing of the house"),
    ("trainers/run/worker.py", "import torch", "the Ray side never imports torch"),
    ("app/services/jobs.py", "import fastapi", "services are free of the door they are reached by"),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-logo"]
    environment = {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_tree_keeps_every_contract(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS)
def test_a_seeded_violation_is_found(copy: Path, file: str, line: str, contract: str) -> None:
    seeded = copy / file
    before = seeded.read_text()
    seeded.write_text(f"{before}\n{line}\n")
    try:
        done = lint(copy)
    finally:
        seeded.write_text(before)
    broken = [text for text in done.stdout.splitlines() if text.endswith("BROKEN")]
    assert done.returncode == 1
    assert len(broken) == 1 and broken[0].startswith(contract), done.stdout


def test_no_file_is_long() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for folder in (*PACKAGES, "tests", "examples", "benchmarks")
        for file in (ROOT / folder).rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > MOST_LINES
    }
    assert not long, f"more than {MOST_LINES} lines: {long}"
