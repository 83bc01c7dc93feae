"""How far a job is, from its object and its events: what `jobs watch` draws."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.cli.output import clean
from app.cli.units import span, sparkline

CURVE_STEPS = 400
RECENT_STEPS = 20


class Progress:
    """`step` of `steps`; losses by step, so that a step computed again after a fault counts once."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        reached = job.get("progress") or {}
        self.step: int = reached.get("step") or 0
        self.steps: int | None = reached.get("steps") or reached.get("total_steps")
        self.epoch: float | None = reached.get("epoch")
        self.note = ""
        self._losses: dict[int, float] = {}
        self._seconds: deque[float] = deque(maxlen=RECENT_STEPS)

    def absorb(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event.get("type") == "metrics":
            for row in steps_of(data):
                self._take(row)
        elif event.get("type") == "state":
            self.job = {**self.job, "status": data.get("status") or self.job["status"]}
            self.note = event.get("message", "")
        self.steps = data.get("steps") if isinstance(data.get("steps"), int) else self.steps

    def _take(self, row: dict[str, Any]) -> None:
        self.step, self.epoch = row["step"], row.get("epoch", self.epoch)
        if row.get("loss") is not None:
            self._losses[row["step"]] = row["loss"]
        if row.get("seconds"):
            self._seconds.append(row["seconds"])
        for old in list(self._losses)[:-CURVE_STEPS]:
            del self._losses[old]

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss in sorted(self._losses.items())]

    @property
    def eta_s(self) -> float | None:
        if not self.steps or not self._seconds:
            return None
        return (self.steps - self.step) * sum(self._seconds) / len(self._seconds)

    def summary(self) -> str:
        """`step 12/40  loss 1.234  2.1 s/step  about 58 s left`."""
        parts = [f"step {self.step}/{self.steps}" if self.steps else f"step {self.step}"]
        if self.losses:
            parts.append(f"loss {self.losses[-1]:.4f}")
        if self._seconds:
            parts.append(f"{sum(self._seconds) / len(self._seconds):.2g} s/step")
        if self.eta_s is not None and self.step < (self.steps or 0):
            parts.append(f"about {span(self.eta_s)} left")
        return "  ".join(parts)

    def picture(self) -> RenderableType:
        """Three lines for the foot of a terminal of 80 columns."""
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.steps, completed=self.step, width=24, pulse=not self.steps)
        head.add_row(Text(self.job["id"], "bold"), Text(clean(self._status()), "cyan"), bar)
        lines: list[RenderableType] = [head, Text(self.summary(), no_wrap=True)]
        if len(self.losses) > 1:
            low, high = min(self.losses), max(self.losses)
            lines.append(
                Text.assemble(
                    ("loss ", "dim"), (sparkline(self.losses, 50), "green"), (f"  {high:.3g} … {low:.3g}", "dim")
                )
            )
        return Group(*lines)

    def _status(self) -> str:
        details = self.job.get("status_details") or {}
        since = details.get("since")
        waited = (
            f" {span(time.time() - since)}" if since and self.job["status"] in ("queued", "validating_files") else ""
        )
        return f"{self.job['status']}{waited}"


def steps_of(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A `metrics` event tells of one step, or of several that came together."""
    rows = data.get("rows") or (data.get("steps") if isinstance(data.get("steps"), list) else None)
    if rows:
        yield from rows
    elif "step" in data:
        yield data
