"""What a run measured, step by step, from the messages of the child as lines of JSON. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple

Series = Dict[str, Tuple[Tuple[int, float], ...]]
"""By name: (step, value), in the order of the steps."""

_OF_A_STEP = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "accuracy": "train/accuracy",
    "reward_accuracy": "train/reward_accuracy",
    "reward_margin": "train/reward_margin",
}
_NOT_MEASURES = ("type", "step", "when", "rows")


@dataclass(frozen=True)
class History:
    series: Series

    @property
    def steps(self) -> int:
        return max((step for points in self.series.values() for step, _ in points), default=0)


def read_history(lines: Iterable[str]) -> History:
    """`step` and `evaluated` messages count, others are passed over. A step that was computed again counts as the last time."""
    found: Dict[str, Dict[int, float]] = {}
    for line in lines:
        message = json.loads(line) if line.strip() else {}
        for name, value in _measures(message):
            found.setdefault(name, {})[int(message["step"])] = value
    return History({name: tuple(sorted(points.items())) for name, points in found.items()})


def _measures(message: Mapping[str, Any]) -> Iterable[Tuple[str, float]]:
    if message.get("type") == "step":
        return [(name, float(message[key])) for key, name in _OF_A_STEP.items() if key in message]
    if message.get("type") == "evaluated":
        return [
            (f"validation/{key}", float(value))
            for key, value in message.items()
            if key not in _NOT_MEASURES and isinstance(value, (int, float))
        ]
    return []


FILE = "history.jsonl"
MOST_STEPS = 4096


class Journal:
    """What a run measures, kept beside its checkpoints and its model; of a long one every second step, every fourth …"""

    def __init__(self) -> None:
        self._steps: List[Dict[str, Any]] = []
        self._evaluations: List[Dict[str, Any]] = []
        self._every = 1

    def add(self, type: str, step: int, fields: Mapping[str, Any]) -> None:
        """`type`: step or evaluated."""
        measured = {key: value for key, value in fields.items() if isinstance(value, (int, float, str))}
        message = {**measured, "type": type, "step": step}
        if type == "evaluated":
            self._evaluations.append(message)
        elif step % self._every == 0:
            self._steps.append(message)
        if len(self._steps) > MOST_STEPS:
            self._every *= 2
            self._steps = [message for message in self._steps if message["step"] % self._every == 0]

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text("".join(f"{line}\n" for line in self._lines()), encoding="utf-8")

    def read(self, folder: Path) -> None:
        """What an earlier attempt measured, where it kept that."""
        if (folder / FILE).is_file():
            for line in (folder / FILE).read_text(encoding="utf-8").splitlines():
                message = json.loads(line)
                self.add(message["type"], message["step"], message)

    def history(self) -> History:
        return read_history(self._lines())

    def _lines(self) -> List[str]:
        return [json.dumps(message) for message in [*self._steps, *self._evaluations]]
