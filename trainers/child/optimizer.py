"""The optimizer, and its state on disk: whole and by name, so that any number of ranks can go on with it. A name is
`<part>/<parameter>`, a part `step`, one of `MOMENTS`, or `master` (fp32) of a parameter in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainers.config import Hyperparams

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, as torch names them."""
FILE_BYTES = 1 << 30
"""Tensors that are held together until they are written."""

Named = tuple[str, torch.Tensor]


def adamw(parameters: Sequence[torch.Tensor], hyper: Hyperparams) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=hyper.lr, weight_decay=hyper.weight_decay, fused=True)


def trained(loss: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """What is trained, by name."""
    return [(name, parameter) for name, parameter in loss.named_parameters() if parameter.requires_grad]


def write_state(state: Iterable[Named], folder: Path | None) -> None:
    """`folder` None: iterates only, as the ranks do that write nothing."""
    held: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in state:
        if folder is None:
            continue
        held[name] = tensor.detach().cpu().contiguous()
        if sum(one.nbytes for one in held.values()) >= FILE_BYTES:
            number += 1
            _write(held, folder, number)
            held = {}
    if folder is not None and held:
        _write(held, folder, number + 1)


def _write(held: dict[str, torch.Tensor], folder: Path, number: int) -> None:
    save_file(held, folder / f"optimizer-{number:05d}.safetensors")


class Saved:
    """What `write_state` left in `folder`; a context. Raises OSError and safetensors' own error for files that are not whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Saved:
        for path in sorted(self._folder.glob("optimizer-*.safetensors")):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> torch.Tensor:
        """A copy: what is read maps the file, which may go. Raises KeyError."""
        tensor: torch.Tensor = self._files[name].get_tensor(name).clone()
        return tensor
