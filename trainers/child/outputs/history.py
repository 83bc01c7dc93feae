"""What a run measured, step by step, from the messages of the child as lines of JSON. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Dict, Tuple

Series = Dict[str, Tuple[Tuple[int, float], ...]]
"""By name: (step, value), in the order of the steps."""

_OF_A_STEP = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
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
