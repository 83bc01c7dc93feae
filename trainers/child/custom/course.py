"""Where a script's run stands: the steps that it has reported, and the checkpoints that are kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.child.custom.kept import Custody, Position, Refused
from trainers.protocol import Message

COLUMNS = ("epoch", "lr", "grad_norm", "tokens")
"""Of a step's row, besides step, loss and seconds."""


class Course:
    """`every_s`: a checkpoint is due so long after the last one, once a step was done since. `clock`: seconds, monotonic."""

    def __init__(
        self, custody: Custody, position: Position, every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.custody = custody
        self.position = position
        self.told_at = clock()
        """When it was last heard that the run goes on."""
        self.fresh = False
        """There is something that no checkpoint holds."""
        self._saved_step = position.step
        self._saved_at = clock()
        self._every_s = every_s
        self._clock = clock

    @property
    def due(self) -> bool:
        return self.fresh and self._clock() - self._saved_at >= self._every_s

    def report(self, message: Message) -> dict[str, Any]:
        """The fields of a `step` message. Raises Refused."""
        step, metrics = message["step"], {**message["metrics"], "loss": message["loss"]}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or step < 1:
            raise Refused(
                f"step {step} is not recorded: " + (f"{', '.join(bad)} is not finite" if bad else "they begin with 1")
            )
        others = {name: value for name, value in metrics.items() if name not in (*COLUMNS, "loss")}
        self.position = Position(step, {**self.position.metrics, **others, "train_loss": message["loss"]})
        self.fresh, self.told_at = True, self._clock()
        row = {name: metrics.get(name, 0.0) for name in COLUMNS}
        return {
            **row,
            "step": step,
            "loss": message["loss"],
            "seconds": message["seconds"],
            "tokens": int(row["tokens"]),
        }

    def keep(self, source: Path | None = None) -> dict[str, Any]:
        """The fields of a `checkpoint` message, of the folder that was opened or of `source`. Raises Refused. A step has one
        checkpoint; of a script that reports no steps, checkpoints are what is counted."""
        position = Position(max(self.position.step, self._saved_step + 1), self.position.metrics)
        self.fresh, self._saved_at = False, self._clock()
        try:
            fields = self.custody.take(position, source)
        except OSError as error:
            raise Refused(str(error)) from error
        self.position, self._saved_step = position, position.step
        return fields
