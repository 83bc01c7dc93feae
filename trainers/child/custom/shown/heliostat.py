"""What a script of `method: custom` may use of Heliostat, if it likes: `from heliostat import job`. Standard library only.

Outside of a job it stands alone (copy this file beside the script): reports are printed, and nobody ever interrupts.

    def save(folder):                                  # a pathlib.Path: new, empty, the same for all ranks
        torch.save({"model": model.state_dict(), "step": step}, folder / "state.pt")

    for step in range(first, job.params.get("steps", 100)):
        loss = train_one_step()
        job.report(step=step + 1, loss=loss)
        job.between(save)                              # here the run may be cut, parked, or asked for a checkpoint
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Dict, Optional, Union

FD_VARIABLE = "HELIOSTAT_JOB_FD"
MAX_ANSWER_BYTES = 128 * 1024
MAX_LOG_CHARS = 4000

Save = Callable[[Path], object]


class Job:
    """The run as its script sees it. Every rank has one; all ranks call `between` at the same places."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.params: Dict[str, Any] = json.loads(os.environ.get("HELIOSTAT_PARAMS", "{}"))
        """`params` of the request, and the hyperparameters that it names."""
        self.model = _folder("HELIOSTAT_MODEL")
        """The base model: config.json, safetensors, tokenizer."""
        self.start_from = _folder("HELIOSTAT_START_FROM")
        """What a tuned version that is no whole model adds to `model` (an adapter, say); else None."""
        self.data = _folder("HELIOSTAT_DATA")
        """train.jsonl, and validation.jsonl where there is one."""
        self.output = _folder("HELIOSTAT_OUTPUT")
        """What lies here when the script has ended becomes the model version."""
        self.checkpoints = _folder("HELIOSTAT_CHECKPOINTS")
        self.resume_folder = _folder("HELIOSTAT_RESUME_FROM")
        """The last checkpoint of this job, to be read; None: it starts afresh."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self._wire = _inherited(os.environ.get(FD_VARIABLE))
        if self._wire is not None:
            self._tell("here")

    def report(self, *, step: int, loss: float, **metrics: float) -> None:
        """A step is done: a row of the job's curve. `epoch`, `lr`, `grad_norm` and `tokens` go into the row, other numbers into
        the metrics of checkpoints and of the model version. Counted from 1; of rank 0."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        numbers = {name: float(value) for name, value in metrics.items()}
        self._tell("report", step=int(step), loss=float(loss), seconds=seconds, metrics=numbers)

    def log(self, message: str) -> None:
        """An event of the job, beside the lines that the script prints."""
        self._tell("log", message=str(message)[:MAX_LOG_CHARS])

    def between(self, save: Optional[Save] = None) -> None:
        """Between two steps: returns at once, or later (the job is parked). `save` writes all that a resumed run needs into
        the folder that it is given; it is called when a checkpoint is due. Raises SystemExit when the job shall give way."""
        answer = self._ask("between", saves=save is not None)
        while answer["type"] == "save" and save is not None:
            save(Path(answer["folder"]))
            answer = self._ask("saved")
        if answer["type"] == "stop":
            raise SystemExit(0)
        self._since = time.monotonic()

    def checkpoint(self, folder: Union[str, Path]) -> None:
        """For scripts that write checkpoints when they like: this one, a folder below `checkpoints`, is complete. It is taken
        away from there. Of rank 0. Raises ValueError when it cannot be kept."""
        answer = self._ask("checkpoint", folder=str(Path(folder).absolute())) if self.rank == 0 else {"type": "go"}
        if answer["type"] == "refused":
            raise ValueError(answer["message"])

    def _tell(self, type: str, **fields: Any) -> None:
        if self._wire is None:
            print(json.dumps({"type": type, **fields}), flush=True)  # noqa: T201
        elif self._pid == os.getpid():  # not in a process that a library has forked
            self._wire.send(json.dumps({"type": type, **fields}).encode())

    def _ask(self, type: str, **fields: Any) -> Dict[str, Any]:
        if self._wire is None or self._pid != os.getpid():
            return {"type": "go"}
        with self._lock:
            self._tell(type, **fields)
            answer = self._wire.recv(MAX_ANSWER_BYTES)
        if not answer:
            raise SystemExit("the job's supervisor is gone")
        told: Dict[str, Any] = json.loads(answer)
        return told


def _folder(variable: str) -> Optional[Path]:
    return Path(os.environ[variable]) if variable in os.environ else None


def _inherited(number: Optional[str]) -> Optional[socket.socket]:
    if number is None:
        return None
    wire = socket.socket(fileno=int(number))
    wire.set_inheritable(False)
    return wire


job = Job()
