"""Weights of which each rank has a part only (ZeRO-3): loaded in parts, and put together to be written."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainers.child.deepspeed_config import deepspeed_config, zero_stage
from trainers.child.world import World
from trainers.child.zero import load_deepspeed
from trainers.config import TrainConfig


@contextmanager
def parted_loading(config: TrainConfig, precision: str) -> Iterator[None]:
    """Within it `from_pretrained` makes each weight and parts it before it makes the next, so that no rank ever holds the whole
    model. Changes nothing for a run whose weights are not parted."""
    if zero_stage(config) < 3:
        yield
        return
    load_deepspeed(config.devices)
    integration = importlib.import_module("transformers.integrations.deepspeed")
    told = integration.HfDeepSpeedConfig(deepspeed_config(config, 1, bf16=precision == "bf16"))
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()
        del told  # transformers knows it weakly only


def whole_weights(model: Any, world: World) -> dict[str, torch.Tensor] | None:
    """On rank 0 of parted weights the model's state, of an adapter what it trains; None where the model has it itself, and
    nothing on other ranks. Called by all ranks together."""
    if not any(is_parted(parameter) for parameter in model.parameters()):
        return None
    zero = importlib.import_module("deepspeed").zero
    adapts = hasattr(model, "peft_config")
    found: dict[str, torch.Tensor] = {}
    once: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if adapts and not tensor.requires_grad:
            continue
        with zero.GatheredParameters([tensor], enabled=is_parted(tensor)):
            if world.rank == 0:
                if id(tensor) not in once:  # a weight with two names stays one
                    once[id(tensor)] = tensor.detach().cpu().clone()
                found[name] = once[id(tensor)]
    return found


@contextmanager
def put_together(model: Any) -> Iterator[bool]:
    """Within it each rank has all weights; rank 0's are parted again. Whether there is anything parted."""
    parted = [parameter for parameter in model.parameters() if is_parted(parameter)]
    if not parted:
        yield False
        return
    with importlib.import_module("deepspeed").zero.GatheredParameters(parted, modifier_rank=0):
        yield True


def is_parted(parameter: Any) -> bool:
    """Whether this rank has a part of it only, and asks the others when a layer needs it."""
    return hasattr(parameter, "ds_id")


def numel(parameter: Any) -> int:
    """Of the whole."""
    return int(parameter.ds_numel) if is_parted(parameter) else int(parameter.numel())
