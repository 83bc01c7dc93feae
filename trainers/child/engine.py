"""One optimizer step, two ways: a plain loop in which each rank holds everything, or DeepSpeed ZeRO. The recipe sees no
difference, and neither does a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from trainers.child.deepspeed_config import BUCKET, zero_stage
from trainers.child.loss import SummedLoss
from trainers.child.optimizer import MOMENTS, Named, Saved, adamw, trained
from trainers.child.park import tensors_in
from trainers.child.world import World
from trainers.child.zero import ZeroEngine
from trainers.config import Hyperparams, TrainConfig


class Engine(Protocol):
    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """`loss`: this rank's part of the global batch's mean. `last`: of this step."""
        ...

    def step(self, lr: float) -> torch.Tensor | float:
        """Clips, updates, clears; the gradient's norm before clipping, on the device, which may still be at it. A norm that is not
        finite may leave the weights as they are or not: the run has failed."""
        ...

    def state(self) -> Iterator[Named]:
        """The optimizer's whole state, by the names of `trainers.child.optimizer`, one tensor at a time. All ranks iterate
        together; rank 0's tensors are the ones to keep."""
        ...

    def load_state(self, saved: Saved) -> None:
        """What any engine with any number of ranks has saved; each rank takes its part."""
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that it keeps on the device beside the model, in whatever form."""
        ...


def make_engine(loss: SummedLoss, config: TrainConfig, world: World, micro_batch_size: int) -> Engine:
    """Called by all ranks together, when they have model and rows."""
    world.meet()
    if zero_stage(config) == 0:
        return PlainEngine(loss, config.hyperparams, world)
    return ZeroEngine(loss, config, world, micro_batch_size)


@dataclass(frozen=True)
class _Trained:
    """`master`: what the optimizer updates, in fp32; the parameter itself where it is that."""

    name: str
    parameter: torch.nn.Parameter
    master: torch.Tensor

    @property
    def copied(self) -> bool:
        return self.master is not self.parameter


class PlainEngine:
    """AdamW over fp32 masters; a parameter that is fp32 already is its own master. Several ranks add up their gradients."""

    def __init__(self, loss: SummedLoss, hyper: Hyperparams, world: World) -> None:
        self._trained = [_Trained(name, p, _master(p, hyper)) for name, p in trained(loss)]
        self._masters = [one.master for one in self._trained]
        self._optimizer = adamw(self._masters, hyper)
        self._max_norm = hyper.max_grad_norm
        self._world = world

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> torch.Tensor:
        for one in self._trained:
            if one.copied:
                gradient, one.parameter.grad = one.parameter.grad, None
                one.master.grad = None if gradient is None else gradient.to(one.master.device, torch.float32)
        if self._world.size > 1:
            _add_up(self._masters, self._world.device)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_norm)
        if norm.device.type != "cpu" or torch.isfinite(norm):  # an accelerator would have to be waited for
            self._update(lr)
        return norm

    def _update(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for one in self._trained:
                if one.copied:
                    one.parameter.copy_(one.master)

    def state(self) -> Iterator[Named]:
        """Nothing of a parameter that never had a gradient."""
        for one in self._trained:
            if one.copied:
                yield f"master/{one.name}", one.master
            for key, value in self._optimizer.state[one.master].items() if one.master in self._optimizer.state else ():
                yield f"{key}/{one.name}", value

    def load_state(self, saved: Saved) -> None:
        for one in self._trained:
            if f"step/{one.name}" in saved:
                self._optimizer.state[one.master] = {
                    key: saved.read(f"{key}/{one.name}").to(one.master.device) for key in ("step", *MOMENTS)
                }
            if one.copied:
                one.master.copy_(saved.read(f"master/{one.name}"))

    def tensors(self) -> Iterator[torch.Tensor]:
        return tensors_in([self._masters, dict(self._optimizer.state)])


def _master(parameter: torch.Tensor, hyper: Hyperparams) -> torch.Tensor:
    device = parameter.device if hyper.offload == "none" else torch.device("cpu")
    if (parameter.dtype, parameter.device) == (torch.float32, device):
        return parameter
    return parameter.detach().to(device, torch.float32)


def _add_up(masters: Sequence[torch.Tensor], device: str) -> None:
    """Gradients over all ranks, many at a time. One that a rank has none of, as of an expert that saw no token, counts as 0."""
    for bucket in _buckets(masters):
        gradients = [torch.zeros_like(master) if master.grad is None else master.grad for master in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).to(device)
        dist.all_reduce(flat)
        parts = flat.to(gradients[0].device).split([master.numel() for master in bucket])
        for master, part in zip(bucket, parts, strict=True):
            master.grad = part.view_as(master)


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
