"""One optimizer step, two ways: a plain loop for one rank, DeepSpeed ZeRO-2 for more. The recipe sees no difference."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from trainers.child.deepspeed_config import deepspeed_config
from trainers.child.loss import SummedLoss
from trainers.child.park import tensors_in
from trainers.child.world import World
from trainers.config import Hyperparams, TrainConfig

State = dict[str, Any]


class Engine(Protocol):
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`loss`: this rank's part of the global batch's mean. `last`: of this step."""
        ...

    def step(self, lr: float) -> float:
        """Clips, updates, clears; the gradient's norm before clipping. A norm that is not finite may leave the weights as
        they are or not: the run has failed."""
        ...

    def state(self) -> State:
        """This rank's optimizer state, tensors and plain values only."""
        ...

    def load_state(self, state: State) -> None: ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it keeps on the device beside the model, in whatever form."""
        ...


def make_engine(loss: SummedLoss, config: TrainConfig, world: World, micro_batch_size: int) -> Engine:
    if world.size == 1:
        return PlainEngine(loss, config.hyperparams)
    return ZeroEngine(loss, config, world, micro_batch_size)


def _adamw(parameters: list[torch.Tensor], hyper: Hyperparams) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=hyper.lr, weight_decay=hyper.weight_decay, fused=True)


class PlainEngine:
    """AdamW over fp32 masters; a parameter that is fp32 already is its own master."""

    def __init__(self, loss: SummedLoss, hyper: Hyperparams) -> None:
        self._parameters = [p for p in loss.parameters() if p.requires_grad]
        self._masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self._parameters]
        self._optimizer = _adamw(self._masters, hyper)
        self._max_norm = hyper.max_grad_norm

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_norm)
        if torch.isfinite(norm):
            self._update(lr)
        return float(norm)

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)

    def state(self) -> State:
        masters = [None if m is p else m for p, m in zip(self._parameters, self._masters, strict=True)]
        return {"optimizer": self._optimizer.state_dict(), "masters": masters}

    def load_state(self, state: State) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        _copy_all(self._masters, state["masters"])

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_in([self._masters, dict(self._optimizer.state)])


class ZeroEngine:
    """ZeRO-2: each rank holds the optimizer state and the masters of its part of the parameters."""

    def __init__(self, loss: SummedLoss, config: TrainConfig, world: World, micro_batch_size: int) -> None:
        deepspeed = load_deepspeed(config.devices)
        trainable = [p for p in loss.parameters() if p.requires_grad]
        self._world = world
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=loss,
            optimizer=_adamw(trainable, config.hyperparams),
            config=deepspeed_config(config, micro_batch_size, bf16=trainable[0].dtype == torch.bfloat16),
            dist_init_required=False,
        )

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over the ranks; the parts are meant to be summed
        self._engine.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def state(self) -> State:
        """Not DeepSpeed's own format, which pickles objects: the two things that make up the state."""
        return {
            "optimizer": self._optimizer.optimizer.state_dict(),
            "masters": list(self._optimizer.single_partition_of_fp32_groups),
        }

    def load_state(self, state: State) -> None:
        self._optimizer.optimizer.load_state_dict(state["optimizer"])
        _copy_all(self._optimizer.single_partition_of_fp32_groups, state["masters"])

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_in([vars(self._optimizer), dict(self._optimizer.optimizer.state)])


def load_deepspeed(devices: str) -> Any:
    """Imports DeepSpeed, and tells it not to compile its shared-memory op (minutes, and a compiler)."""
    deepspeed = importlib.import_module("deepspeed")
    ops = importlib.import_module("deepspeed.ops")
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if devices == "cuda" else "gloo", verbose=False)
    return deepspeed


def _copy_all(targets: list[torch.Tensor], sources: list[torch.Tensor | None]) -> None:
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            if source is not None:
                target.copy_(source)
