"""`make drill`: SIGKILL to every part of a running Heliostat at seeded random steps; each case must end with the same losses.

    python -m tests.drills.kills [--rounds 3] [--seed 1]

Each finished case is a line in benchmarks/drills/kills.jsonl with commit and hardware; a case that stands there for this commit is
not run again, so an interrupted drill goes on where it was."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from builders_llama import make_tiny_llama  # noqa: E402
from heliostat_service import SETTINGS, Service, ended, rows, started, upload  # noqa: E402
from kills import STEPS, TARGETS, check_same, run_undisturbed, run_with_kill  # noqa: E402

from benchmarks.hardware import hardware  # noqa: E402

RECORD = ROOT / "benchmarks" / "drills" / "kills.jsonl"


def commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


def cases(rounds: int, seed: int) -> list[tuple[int, str, int]]:
    """(round, target, step to kill after)."""
    dice = random.Random(seed)
    return [(number, target, dice.randint(2, STEPS - 5)) for number in range(rounds) for target in TARGETS]


def recorded(now: str) -> set[tuple[int, str, int]]:
    if not RECORD.exists():
        return set()
    lines = [json.loads(line) for line in RECORD.read_text().splitlines()]
    return {(line["round"], line["target"], line["step"]) for line in lines if line["commit"] == now}


def record(line: dict[str, Any]) -> None:
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a") as file:
        file.write(json.dumps(line) + "\n")


def drill(service: Service, wanted: list[tuple[int, str, int]], now: str) -> int:
    undisturbed = run_undisturbed(service)
    failures = 0
    for number, target, step in wanted:
        began = time.monotonic()
        line = {"commit": now, "round": number, "target": target, "step": step, "hardware": hardware()}
        try:
            job_id, disturbed = run_with_kill(service, target, step)
            check_same(undisturbed, disturbed)
            attempts = max(row.attempt for row in disturbed)
            line |= {"ok": True, "job": job_id, "attempts": attempts}
        except AssertionError as error:
            failures += 1
            line |= {"ok": False, "error": str(error)[:2000]}
        line["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps({key: value for key, value in line.items() if key != "hardware"}), flush=True)
        record(line)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    now = commit()
    wanted = [case for case in cases(arguments.rounds, arguments.seed) if case not in recorded(now)]
    print(f"{len(wanted)} cases to run")
    if not wanted:
        return
    service = started(SETTINGS)
    try:
        folder = service.data_dir / "tiny"
        make_tiny_llama(folder)
        service.add_base_model("tiny", folder)
        upload(service.client(), "colours", rows(64))
        failures = drill(service, wanted, now)
    finally:
        ended(service)
    sys.exit(f"{failures} cases failed" if failures else 0)


if __name__ == "__main__":
    main()
