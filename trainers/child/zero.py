"""DeepSpeed's ZeRO: the engine whose ranks share out the optimizer's state, gradients (from stage 2) and weights (3)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainers.child.deepspeed_config import deepspeed_config, zero_stage
from trainers.child.loss import SummedLoss
from trainers.child.optimizer import MOMENTS, Named, Saved, adamw, trained
from trainers.child.park import tensors_in
from trainers.child.world import World
from trainers.config import TrainConfig


class ZeroEngine:
    """Stages 1 to 3."""

    def __init__(self, loss: SummedLoss, config: TrainConfig, world: World, micro_batch_size: int) -> None:
        deepspeed = load_deepspeed(config.devices)
        self._api = importlib.import_module("deepspeed.utils.tensor_fragment")
        self._world = world
        self._stage = zero_stage(config)
        self._trained = trained(loss)
        parameters = [parameter for _, parameter in self._trained]
        self._copied = parameters[0].dtype != torch.float32
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=loss,
            optimizer=adamw(parameters, config.hyperparams),
            config=deepspeed_config(config, micro_batch_size, bf16=parameters[0].dtype == torch.bfloat16),
            dist_init_required=False,
        )

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over the ranks; the parts are meant to be summed
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> torch.Tensor | float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm: torch.Tensor | float = self._engine.get_global_grad_norm()
        return norm

    def state(self) -> Iterator[Named]:
        """Put together from the ranks' parts, parameter by parameter."""
        step = self._adam_state(self._flat[0])["step"]
        for name, parameter in self._trained:
            if self._copied:
                yield f"master/{name}", self._api.safe_get_full_fp32_param(parameter)
            for key in MOMENTS:
                yield f"{key}/{name}", self._api.safe_get_full_optimizer_state(parameter, key)
            yield f"step/{name}", step.clone()

    def load_state(self, saved: Saved) -> None:
        """A parameter that never had a gradient has no state yet: zeros."""
        steps = [saved.read(f"step/{name}") for name, _ in self._trained if f"step/{name}" in saved]
        for flat in self._flat:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self._optimizer.optimizer.state[flat] = {"step": max(steps).to(flat.device), **moments}
        if self._stage < 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()  # as after a first step
        for name, parameter in self._trained:
            for key in MOMENTS:
                if f"{key}/{name}" in saved:
                    self._set(parameter, saved.read(f"{key}/{name}"), key)
            if self._copied:
                self._set(parameter, saved.read(f"master/{name}"))

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_in([vars(self._optimizer), dict(self._optimizer.optimizer.state)])

    @property
    def _flat(self) -> list[torch.Tensor]:
        """What this rank's optimizer updates: its part of all parameters in a row, or several of them."""
        if self._stage == 3:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _adam_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = self._optimizer.optimizer.state[flat]
        return found

    def _set(self, parameter: Any, value: torch.Tensor, key: str | None = None) -> None:
        """This rank's part of a master, or of a moment. DeepSpeed's own way to set a whole one fails in stage 3 where the ranks
        do not divide it evenly."""
        if self._stage < 3:
            to = self._api.safe_set_full_optimizer_state if key else self._api.safe_set_full_fp32_param
        else:
            to = self._api.safe_set_local_optimizer_state if key else self._api.safe_set_local_fp32_param
            size = parameter.ds_tensor.numel()
            whole = torch.nn.functional.pad(value.flatten(), (0, size * self._world.size - value.numel()))
            value = whole[self._world.rank * size :][:size]
        to(parameter, value, *([key] if key else []))


def load_deepspeed(devices: str) -> Any:
    """Imports DeepSpeed, and tells it not to compile its shared-memory op (minutes, and a compiler)."""
    deepspeed = importlib.import_module("deepspeed")
    ops = importlib.import_module("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if devices == "cuda" else "gloo"
    if not dist.is_initialized():  # one rank alone
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return deepspeed
