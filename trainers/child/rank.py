"""One rank's process: seeds and threads, the other ranks, the recipe, and how it ended."""

from __future__ import annotations

import importlib
import os
import random
from dataclasses import replace
from types import ModuleType

import numpy as np
import torch

from trainers.child.control import Control, Wire
from trainers.child.failure import Stopped, TrainFailure, describe
from trainers.child.memory import MemoryLimit
from trainers.child.model import resolve_precision
from trainers.child.world import World, device_of, join
from trainers.config import TrainConfig


def run_rank(config: TrainConfig, rank: int, size: int, wire: Wire) -> None:
    """Returns when the run is finished or stopped; after a failure, told to the wire, raises it."""
    control = Control(wire, World(rank, size), config.checkpoint_every_s)
    control.listen()
    try:
        _run(config, rank, size, control)
    except Stopped:
        return
    except Exception as error:
        control.state = "failed"
        wire.send("failed", step=control.step, **describe(error).fields())
        control.close()
        raise


def _run(config: TrainConfig, rank: int, size: int, control: Control) -> None:
    device = device_of(rank, config)
    memory = MemoryLimit(config.memory_limit_gb, device)
    make_deterministic(config)
    world = join(rank, size, config, device)
    control.join(world)
    config = replace(config, precision=_agreed(config, world))
    recipe(config).run(config, world, control, memory)


def _agreed(config: TrainConfig, world: World) -> str:
    """Processors of several nodes need not be alike; ranks of two precisions would train two models."""
    return "fp32" if world.sum(resolve_precision(config) == "fp32")[0] else "bf16"


RECIPES = {
    ("sft", "causal_lm"): "sft",
    ("dpo", "causal_lm"): "dpo",
    ("sft", "sequence_classification"): "classify",
}


def recipe(config: TrainConfig) -> ModuleType:
    """The recipe's module: `run(config, world, control, memory)`."""
    name = RECIPES.get((config.method, config.task))
    if name is None:
        hint = f"There are: {', '.join(f'{method} with task {task}' for method, task in RECIPES)}."
        message = f"There is no recipe for method {config.method!r} with task {config.task!r}."
        raise TrainFailure("method_unsupported", message, hint=hint)
    return importlib.import_module(f"trainers.child.recipes.{name}")


def make_deterministic(config: TrainConfig) -> None:
    """The same identity of a run gives the same numbers, bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(config.threads_per_slot)
    os.environ["RAYON_NUM_THREADS"] = str(config.threads_per_slot)  # the tokenizer's
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    random.seed(config.hyperparams.seed)
    np.random.seed(config.hyperparams.seed % (1 << 32))
    torch.manual_seed(config.hyperparams.seed)
