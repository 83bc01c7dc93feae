"""Gives memory back while a run waits for its next turn, and takes it again, without a number changing."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

Tensors = Callable[[], Iterable[torch.Tensor]]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Of nested dicts, lists and tuples; with the gradient of each."""
    if isinstance(value, torch.Tensor):
        yield value
        if value.is_leaf and value.grad is not None:
            yield value.grad
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)


def tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Parameters with their gradients, buffers, and what ZeRO-3 keeps of a parameter."""
    for parameter in model.parameters():
        yield from tensors_in([parameter, getattr(parameter, "ds_tensor", None)])
    yield from model.buffers()


class Mover:
    """Empties the storages that `tensors` have on `device` and fills them again. It moves storages, not tensors: tensors that
    share one (tied weights, ZeRO's flat partitions and the parameters that are views of them) share it afterwards too, and
    nobody's reference has to be set anew."""

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        self._tensors = tensors
        self._device = device
        self._kept: list[tuple[torch.UntypedStorage, torch.Tensor]] = []

    def leave(self) -> int:
        """Bytes moved to the host."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in self._here()}
        for storage in storages.values():
            on_host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            on_host.copy_(self._bytes(storage))
            storage.resize_(0)
            self._kept.append((storage, on_host))
        return sum(on_host.nbytes for _, on_host in self._kept)

    def come_back(self) -> None:
        for storage, on_host in self._kept:
            storage.resize_(on_host.nbytes)
            self._bytes(storage).copy_(on_host)
        self._kept.clear()

    def _here(self) -> Iterator[torch.Tensor]:
        for tensor in self._tensors():
            if tensor.device.type == self._device.type and tensor.untyped_storage().nbytes() > 0:
                yield tensor

    def _bytes(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


class Parking:
    """Of one rank. On a GPU all that the run holds there moves to the host and torch's cache is freed; what then stays is the
    CUDA context. On a CPU the state is in the host's memory already: what goes back is what the allocator had kept of steps."""

    def __init__(self, tensors: Tensors, device: str) -> None:
        self._mover = None if device == "cpu" else Mover(tensors, torch.device(device))

    def leave(self) -> None:
        if self._mover is None:
            trim_heap()
            return
        gc.collect()
        torch.cuda.synchronize()
        self._mover.leave()
        torch.cuda.empty_cache()

    def come_back(self) -> None:
        if self._mover is not None:
            self._mover.come_back()


def trim_heap() -> None:
    """Freed memory that glibc keeps goes back to the kernel; elsewhere nothing happens."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
