"""Where a script's run stands: the steps that it has reported, and the checkpoints that are kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainers.child.custom.kept import Custody, Position, Refused
from trainers.protocol import Message

MAX_UNSAVED = 2
MOST_OF_TIME = 0.1
"""Both as in `trainers.child.control`."""
MAX_INTEGER = 2**63 - 1
"""That can be recorded."""
COLUMNS = ("epoch", "lr", "grad_norm", "tokens")
"""Of a step's row, besides step, loss and seconds."""


class Course:
    """`every_s`: a checkpoint is due so long after the last one (later where one takes long), once a step was done since, and not
    while two are not stored yet; 0: after each step. `clock`: seconds, monotonic."""

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
        self._saved_at = self._opened_at = clock()
        self._cost_s = 0.0
        self._unsaved: set[int] = set()
        self._every_s = every_s
        self._clock = clock

    @property
    def due(self) -> bool:
        if not self.fresh or not self._every_s:
            return self.fresh
        period_s = max(self._every_s, self._cost_s / MOST_OF_TIME)
        return self._clock() - self._saved_at >= period_s and len(self._unsaved) < MAX_UNSAVED

    def open(self) -> Path:
        """A new, empty folder to write a checkpoint into. The script does nothing else until that is kept."""
        self._opened_at = self._clock()
        return self.custody.open()

    def saved(self, step: int) -> None:
        """It is stored: what is older may go."""
        self._unsaved = {one for one in self._unsaved if one > step}
        self.custody.prune(step)

    def dropped(self, step: int) -> None:
        """It will not be stored."""
        self._unsaved.discard(step)
        self.custody.drop(step)

    def report(self, message: Message) -> dict[str, Any]:
        """The fields of a `step` message. Raises Refused."""
        step, metrics = message["step"], {**message["metrics"], "loss": message["loss"]}
        _check(step, metrics)
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
        self.fresh = False
        try:
            fields = self.custody.take(position, source)
        except OSError as error:
            raise Refused(str(error)) from error
        finally:
            self._saved_at = self._clock()
        if source is None:
            self._cost_s = self._saved_at - self._opened_at
        self.position, self._saved_step = position, position.step
        self._unsaved.add(position.step)
        return fields


def _check(step: int, metrics: dict[str, Any]) -> None:
    """Raises Refused for what cannot be recorded."""
    endless = [name for name, value in metrics.items() if not abs(value) < math.inf]
    whole = {name: value for name, value in metrics.items() if isinstance(value, int) or name == "tokens"}
    large = [name for name, value in {"step": step, **whole}.items() if abs(value) > MAX_INTEGER]
    for names, why in ((endless, "is not finite"), (large, "has more than 64 bits")):
        if names:
            raise Refused(f"a step is not recorded: {', '.join(names)} {why}")
    if step < 1:
        raise Refused(f"step {step} is not recorded: they begin with 1")
