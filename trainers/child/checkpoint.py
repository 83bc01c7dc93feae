"""Everything a run needs to go on with the same numbers: weights, optimizer, random generators, and the step."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from trainers.child.artifact import save_model
from trainers.child.data import file_sha256
from trainers.child.engine import Engine
from trainers.child.failure import TrainFailure
from trainers.child.folders import aside, discard, publish, total_bytes
from trainers.child.model import STATE_FILE
from trainers.child.optimizer import Named, Saved, write_state
from trainers.child.outputs.history import Journal
from trainers.child.parted import whole_weights
from trainers.child.world import World
from trainers.config import TrainConfig

FORMAT = 2
RANDOM_FILE = "random.pt"


@dataclass(frozen=True)
class Position:
    """Where a run stands. The rows of a step follow from its number. `evaluated_step`: the last one that was evaluated.
    `worlds`: [[after which step, so many ranks] …], one for each change."""

    step: int = 0
    evaluated_step: int = -1
    metrics: dict[str, Any] = field(default_factory=dict)
    worlds: list[list[int]] = field(default_factory=list)

    def continued_by(self, size: int) -> Position:
        if self.worlds and self.worlds[-1][1] == size:
            return self
        return replace(self, worlds=[*self.worlds, [self.step, size]])


@dataclass(frozen=True)
class Written:
    step: int
    path: Path
    bytes: int
    sha256: dict[str, str]


def _untold(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run under `output_dir`. `progress`: told of a large one, tensor by tensor."""

    config: TrainConfig
    world: World
    identity: str
    precision: str
    kernels: str
    journal: Journal = field(default_factory=Journal)
    progress: Callable[[str, int, int], None] = _untold

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / "checkpoints"

    def write(self, position: Position, model: Any, engine: Engine) -> Callable[[], Written] | None:
        """Called by all ranks together; rank 0 puts all parts together. Returns once the files are handed to the system, whose
        page cache is the snapshot: the training may go on. On rank 0, what must then be called, from any thread: it waits for
        the disk, checks, hashes, and names the checkpoint. Raises OSError, both."""
        target = self.folder / f"step-{position.step:08d}"
        temporary = aside(target) if self.world.rank == 0 else None
        write_state(self._told(engine.state(), position.step), temporary)
        weights = whole_weights(model, self.world)
        random_states = self.world.gathered(_random_state(self.world))
        if temporary is not None:
            torch.save(random_states, temporary / RANDOM_FILE)
            save_model(model, temporary, weights)
            self.journal.write(temporary)
            made_by = {"format": FORMAT, "identity": self.identity}
            chosen = {"precision": self.precision, "kernels": self.kernels}
            state = {**made_by, **chosen, **asdict(position)}
            (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        self.world.barrier()
        return None if temporary is None else lambda: _named(position.step, temporary, target)

    def _told(self, state: Iterator[Named], step: int) -> Iterator[Named]:
        for number, named in enumerate(state, 1):
            yield named
            self.progress(f"checkpoint of step {step}, tensors", number, 0)

    def read(self, folder: Path, engine: Engine) -> Position:
        """Restores engine and random generators; the weights are loaded already, since they lie there as a model does.
        Raises TrainFailure when the checkpoint is damaged or of another run."""
        try:
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            if (state.get("format"), state.get("identity")) != (FORMAT, self.identity):
                raise _unreadable(folder, "it is of a run with other data or hyperparameters, or of another version")
            random_states = torch.load(folder / RANDOM_FILE, map_location="cpu", weights_only=True)
            with Saved(folder) as saved:
                engine.load_state(saved)
            self.journal.read(folder)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise _unreadable(folder, f"{type(error).__name__}: {error}") from error
        position = Position(state["step"], state["evaluated_step"], state["metrics"], state["worlds"])
        if len(random_states) == self.world.size:
            _restore_random(random_states[self.world.rank])
        else:
            _draw_anew(self.config.hyperparams.seed, position.step, self.world.rank)
        return position.continued_by(self.world.size)

    def prune(self, durable: int, keep: int | None = None) -> None:
        """The checkpoint of step `durable` is safe elsewhere: only the newest `keep_checkpoints` up to it stay, and `keep`."""
        older = sorted(path for path in self.folder.glob("step-*") if step_of(path) <= durable)
        for path in older[: -max(1, self.config.keep_checkpoints)]:
            if step_of(path) != keep:
                discard(path)

    def drop(self, step: int) -> None:
        discard(self.folder / f"step-{step:08d}")

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


_NO_NUMBERS = (
    "micro_batch_size", "zero_stage", "offload", "gradient_checkpointing", "use_liger_kernel", "load_best_model_at_end",
)  # fmt: skip
"""Hyperparameters that change rounding at most, or only what is kept."""


def identity_of(config: TrainConfig, precision: str) -> str:
    """A digest of what makes the numbers of a run, up to rounding. Threads, processor and the number of ranks belong to it too,
    but a checkpoint may move."""
    hyper = {key: value for key, value in asdict(config.hyperparams).items() if key not in _NO_NUMBERS}
    parts = {
        "data": file_sha256(Path(config.train_file)),
        "hyperparams": hyper,
        "method": [config.method, config.training_type, precision],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _unreadable(folder: Path, why: str) -> TrainFailure:
    hint = "Resume from another checkpoint, or start the job again."
    return TrainFailure(
        "checkpoint_unusable", f"{folder.name} cannot be used: {why}.", hint=hint, fixable_by="operator"
    )


def _random_state(world: World) -> dict[str, Any]:
    """As JSON has it, but for tuples."""
    of_numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**of_numpy, "state": {**of_numpy["state"], "key": of_numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state().tolist(),
    }
    if world.device != "cpu":
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def _draw_anew(seed: int, step: int, rank: int) -> None:
    """The generators of ranks that are more or fewer than they were: what is drawn from now on (dropout) is another draw."""
    drawn = random.Random(f"{seed}/{step}/{rank}")
    random.seed(drawn.getrandbits(64))
    np.random.seed(drawn.getrandbits(32))
    torch.manual_seed(drawn.getrandbits(63))


def _restore_random(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    of_numpy = state["numpy"]
    key = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**of_numpy, "state": {**of_numpy["state"], "key": key}})
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state:
        torch.cuda.set_rng_state(torch.as_tensor(state["cuda"], dtype=torch.uint8))
