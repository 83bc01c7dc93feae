"""Curves of a run: as one PNG (matplotlib) and as TensorBoard event files (tensorboardX). Neither loads torch."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trainers.child.failure import TrainFailure
from trainers.child.outputs.history import History

TOGETHER = {"train/loss": "loss", "validation/loss": "loss"}
"""Drawn into one panel; every other measure has its own."""


def draw(history: History, file: Path) -> None:
    """Raises TrainFailure when there is nothing to draw or matplotlib is not there."""
    _require_points(history)
    matplotlib = require_library("matplotlib")
    matplotlib.use("Agg")
    pyplot = require_library("matplotlib.pyplot")
    panels = sorted({TOGETHER.get(name, name) for name in history.series}, key=lambda name: (name != "loss", name))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 2.4 * len(panels)), sharex=True, squeeze=False)
    try:
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            _panel(axis, panel, history)
        axes[-1, 0].set_xlabel("step")
        figure.tight_layout()
        figure.savefig(file, dpi=120)
    finally:
        pyplot.close(figure)


def _panel(axis: Any, panel: str, history: History) -> None:
    for name, points in history.series.items():
        if TOGETHER.get(name, name) == panel:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=name, marker="o" if name.startswith("validation") else None, markersize=3)
    axis.set_ylabel(panel)
    axis.grid(alpha=0.3)
    if panel == "loss":
        axis.legend()


def write_events(history: History, folder: Path) -> None:
    """What `tensorboard --logdir` reads. Raises TrainFailure as `draw`."""
    _require_points(history)
    with require_library("tensorboardX").SummaryWriter(logdir=str(folder)) as writer:
        for name, points in history.series.items():
            for step, value in points:
                writer.add_scalar(name, value, step)


def _require_points(history: History) -> None:
    if not history.series:
        hint = "Give the messages of a run that has made at least one step, a JSON object a line."
        raise TrainFailure("no_history", "There is no step and no evaluation to show.", hint=hint)


def require_library(name: str) -> Any:
    """The module. Raises TrainFailure."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        hint = f"Add {name.split('.')[0]} to the packages of this environment."
        raise TrainFailure("package_missing", f"This needs {name}, which is not installed.", hint=hint) from error
