"""The summed cross-entropy of a causal language model, with logits only where there is loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from trainers.child.data import IGNORED, Example

Batch = tuple[torch.Tensor, torch.Tensor]


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """(ids, labels), padded on the right to the longest. A causal model never looks at what is right of a token, so the
    padding needs no mask. No example: one position without loss, so that every rank runs every forward."""
    length = max((len(example.ids) for example in examples), default=2)
    ids = [example.ids + [pad] * (length - len(example.ids)) for example in examples] or [[pad] * length]
    labels = [example.labels + [IGNORED] * (length - len(example.ids)) for example in examples] or [[IGNORED] * length]
    return torch.tensor(ids), torch.tensor(labels)


class SummedLoss(torch.nn.Module):
    """forward(ids, labels) → the sum over all loss tokens; the caller divides by the number of them in the whole batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.splits = False

    def find_split(self) -> None:
        """Whether the head over the inner model's hidden states gives the model's own logits. Some architectures scale or
        cap them; those take the long way."""
        self.splits = False
        base = self._base()
        inner, head = getattr(base, base.base_model_prefix, None), base.get_output_embeddings()
        if inner is None or inner is base or head is None:
            return
        ids = torch.arange(1, 9, device=base.device).unsqueeze(0) % base.config.get_text_config().vocab_size
        with torch.no_grad():
            whole = base(input_ids=ids, use_cache=False).logits
            short = head(inner(input_ids=ids, use_cache=False)[0])
        self.splits = whole.shape == short.shape and torch.allclose(whole.float(), short.float(), rtol=1e-2, atol=1e-2)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wanted = labels[:, 1:] != IGNORED
        base = self._base()
        if self.splits:
            hidden = getattr(base, base.base_model_prefix)(input_ids=ids, use_cache=False)[0][:, :-1]
            logits = base.get_output_embeddings()(hidden[wanted])
        else:
            hidden = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            logits = hidden[wanted]
        if not wanted.any():
            return hidden.float().sum() * 0.0  # keeps every parameter in the graph
        return F.cross_entropy(logits.float(), labels[:, 1:][wanted], reduction="sum")

    def _base(self) -> Any:
        """The causal model itself; LoRA's layers live inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
