"""Runs tenants' scripts under a real conductor, with the test as the worker."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builders_child import Child

from trainers.config import Hyperparams, TrainConfig, launcher_of
from trainers.protocol import FD_VARIABLE, pair

STEPS = """
    import json, os, sys, time
    from heliostat import job

    first = 0
    if job.resume_folder:
        first = int((job.resume_folder / "step").read_text())
    done = first

    def save(folder):
        if job.rank == 0:
            (folder / "step").write_text(str(done))

    for step in range(first, job.params.get("steps", 5)):
        time.sleep(job.params.get("seconds", 0.0))
        done = step + 1
        job.report(step=done, loss=1.0 / done, lr=0.1, accuracy=0.5)
        job.between(save)
    (job.output / f"made-by-{job.rank}").write_text(str(done))
"""
"""Counts steps; writes no checkpoint but when it is told."""


def make_script(folder: Path, text: str, name: str = "train.py") -> Path:
    """The folder of the code."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return folder


def custom_config(folder: Path, text: str = STEPS, **fields: Any) -> TrainConfig:
    """Of a script in a code folder below `folder`, with data and a model beside it. No checkpoint unless told."""
    code = make_script(folder / "program", text)
    for name in ("data", "model"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    max_steps = fields.pop("max_steps", None)
    given: dict[str, Any] = {"entrypoint": ["train.py"], "checkpoint_every_s": 1e9, **fields}
    return TrainConfig(
        base_model=str(folder / "model"),
        train_file=str(folder / "data" / "train.jsonl"),
        output_dir=str(folder / "out"),
        method="custom",
        code=str(code),
        hyperparams=Hyperparams(max_steps=max_steps),
        **given,
    )


@contextmanager
def conductor(python: str = sys.executable) -> Iterator[Child]:
    """Its output is the test's own."""
    ours, theirs = pair()
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [python, "-m", launcher_of("custom")],
        env={**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1", FD_VARIABLE: str(theirs.fileno())},
        pass_fds=(theirs.fileno(),),
    )
    theirs.close()
    try:
        yield Child(ours)
    finally:
        ours.close()
        process.wait(60)
