"""The ranks of one run: who this one is, and the few things that ranks tell each other besides gradients."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from trainers.config import TrainConfig

APART = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """`group`: a gloo group for numbers on the host; None in a world of one."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    group: Any = None

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Each summed over all ranks; on an accelerator nobody waits for it."""
        if self.group is None:
            return values
        summed = values.double()
        dist.all_reduce(summed, group=self.group if self.device == "cpu" else None)
        return summed

    def from_first(self, value: int) -> int:
        """Rank 0's value."""
        if self.group is None:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.broadcast(tensor, src=0, group=self.group)
        return int(tensor)

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on rank 0; elsewhere nothing. As JSON: what another node's rank sends must not be unpickled."""
        if self.group is None:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.sum(*(len(own) * (rank == self.rank) for rank in range(self.size)))]
        padded = torch.nn.functional.pad(own, (0, max(sizes) - len(own)))
        found = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else []
        dist.gather(padded, found or None, dst=0, group=self.group)
        return [json.loads(bytes(text[:size].tolist())) for text, size in zip(found, sizes, strict=False)]

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Rank 0's values take the place of the others', which may be on other nodes."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def meet(self) -> None:
        """Where nodes may be hours apart: one has its rows as tokens already, another has not."""
        if self.group is not None:
            dist.monitored_barrier(self.group, timeout=APART)

    def barrier(self) -> None:
        self.from_first(0)


def device_of(rank: int, config: TrainConfig) -> str:
    """`cpu`, or this node's GPU of the rank."""
    return "cpu" if config.devices == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', rank)}"


def join(rank: int, size: int, config: TrainConfig, device: str) -> World:
    """Meets the other ranks at MASTER_ADDR:MASTER_PORT. Raises RuntimeError when they do not come."""
    gpus = device != "cpu"
    if gpus:
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    limit = timedelta(seconds=config.collective_timeout_s)
    # also of the groups that DeepSpeed makes, which takes no limit of its own
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = limit
    dist.init_process_group("nccl" if gpus else "gloo", rank=rank, world_size=size)
    return World(rank, size, device, dist.new_group(backend="gloo"))
