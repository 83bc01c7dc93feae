"""What drills remember: a line of JSON for each case, so that an interrupted drill goes on where it was."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.hardware import hardware

ROOT = Path(__file__).parents[2]


def commit() -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()


class Records:
    """Of one drill, in benchmarks/drills/<name>.jsonl; only lines of this commit count."""

    def __init__(self, name: str) -> None:
        self._file = ROOT / "benchmarks" / "drills" / f"{name}.jsonl"
        self._commit = commit()

    def lines(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        lines = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [line for line in lines if line["commit"] == self._commit]

    def add(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(json.dumps({"commit": self._commit, "hardware": hardware(), **line}) + "\n")
