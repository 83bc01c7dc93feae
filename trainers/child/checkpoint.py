"""Everything a run needs to go on with the same numbers: weights, optimizer, random generators, and the step."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainers.child.artifact import save_model
from trainers.child.data import file_sha256
from trainers.child.engine import Engine
from trainers.child.failure import TrainFailure
from trainers.child.folders import aside, discard, publish, total_bytes
from trainers.child.outputs.history import Journal
from trainers.child.world import World
from trainers.config import TrainConfig

FORMAT = 1
STATE_FILE = "state.json"
_NO_NUMBERS = ("micro_batch_size", "load_best_model_at_end")
"""Hyperparameters that change rounding at most, or only what is kept."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. The rows of a step follow from its number. `evaluated_step`: the last one that was evaluated."""

    step: int = 0
    evaluated_step: int = -1
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    step: int
    path: Path
    bytes: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run under `output_dir`."""

    config: TrainConfig
    world: World
    identity: str
    journal: Journal = field(default_factory=Journal)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / "checkpoints"

    def write(self, position: Position, model: Any, engine: Engine) -> Callable[[], Written] | None:
        """Called by all ranks together. Returns once the files are handed to the system, whose page cache is the snapshot: the
        training may go on. On rank 0, what must then be called, from any thread: it waits for the disk, checks, hashes, and
        names the checkpoint. Raises OSError, both."""
        target = self.folder / f"step-{position.step:08d}"
        first = self.world.rank == 0
        temporary = aside(target) if first else target.with_name(f".{target.name}.tmp")
        self.world.barrier()
        own = temporary / f"rank-{self.world.rank:05d}.pt"
        torch.save({"engine": engine.state(), "random": _random_state(self.world)}, own)
        if first:
            save_model(model, temporary)
            self.journal.write(temporary)
            state = {"format": FORMAT, "identity": self.identity, "world_size": self.world.size}
            (temporary / STATE_FILE).write_text(json.dumps({**state, **asdict(position)}, indent=1), encoding="utf-8")
        self.world.barrier()
        return (lambda: _named(position.step, temporary, target)) if first else None

    def read(self, folder: Path, engine: Engine) -> Position:
        """Restores engine and random generators; the weights are loaded already, since they lie there as a model does.
        Raises TrainFailure when the checkpoint is damaged or of another run."""
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            rank = torch.load(folder / f"rank-{self.world.rank:05d}.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(folder, str(error)) from error
        if (state.get("format"), state.get("identity")) != (FORMAT, self.identity):
            raise _unreadable(folder, "it belongs to a run with other data, hyperparameters or world size")
        engine.load_state(rank["engine"])
        self.journal.read(folder)
        _restore_random(rank["random"])
        return Position(state["step"], state["evaluated_step"], state["metrics"])

    def prune(self, durable: int, keep: int | None = None) -> None:
        """The checkpoint of step `durable` is safe elsewhere: only the newest `keep_checkpoints` up to it stay, and `keep`."""
        older = sorted(path for path in self.folder.glob("step-*") if step_of(path) <= durable)
        for path in older[: -max(1, self.config.keep_checkpoints)]:
            if step_of(path) != keep:
                discard(path)

    def weights_of(self, step: int, began: int) -> Path | None:
        """Where the weights of an earlier step lie; `began`: the step at which this attempt began."""
        own = self.folder / f"step-{step:08d}"
        if own.is_dir():
            return own
        earlier = self.config.resume_from if step == began else self.config.best_checkpoint
        return Path(earlier) if earlier and step <= began else None


def _named(step: int, temporary: Path, target: Path) -> Written:
    hashes = publish(temporary, target)
    return Written(step, target, total_bytes(target), hashes)


def step_of(path: Path) -> int:
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match.group(1)) if match else -1


def identity_of(config: TrainConfig, precision: str) -> str:
    """A digest of what makes the numbers of a run. Threads and processor belong to it too, but a checkpoint may move; the
    micro-batch changes rounding only, and a run that was short of memory goes on with a smaller one."""
    hyper = {key: value for key, value in asdict(config.hyperparams).items() if key not in _NO_NUMBERS}
    parts = {
        "data": file_sha256(Path(config.train_file)),
        "hyperparams": hyper,
        "method": [config.method, config.training_type, precision],
        "world_size": config.world_size,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _unreadable(folder: Path, why: str) -> TrainFailure:
    hint = "Resume from another checkpoint, or start the job again."
    return TrainFailure(
        "checkpoint_unusable", f"{folder.name} cannot be used: {why}.", hint=hint, fixable_by="operator"
    )


def _random_state(world: World) -> dict[str, Any]:
    of_numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**of_numpy, "state": {**of_numpy["state"], "key": of_numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
    }
    if world.device != "cpu":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    of_numpy = state["numpy"]
    key = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**of_numpy, "state": {**of_numpy["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
