"""Cross-entropy behind an output matrix, a few tokens at a time: the logits never exist whole."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 24
"""How many logits exist at once: 64 MiB in fp32."""


def token_losses(hidden: torch.Tensor, head: Any, targets: torch.Tensor) -> torch.Tensor:
    """[N] fp32 from hidden states [N, H], for any head; in chunks where the head is one plain matrix."""
    if type(head) is not torch.nn.Linear or head.bias is not None or hasattr(head.weight, "ds_id"):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")
    losses: torch.Tensor = _HeadLoss.apply(hidden, head.weight, targets, torch.is_grad_enabled())
    return losses


class _HeadLoss(torch.autograd.Function):
    """The hidden states' gradient for a loss of weight one is worked out in the forward pass, while the logits are there; a
    matrix that learns has its logits computed again, since its gradient sums over the tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, learns: bool
    ) -> torch.Tensor:
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if learns else None
        for part in _chunks(len(hidden), len(weight)):
            logits = F.linear(hidden[part], weight).float()
            total = logits.logsumexp(dim=-1, keepdim=True)
            losses[part] = (total - logits.gather(1, targets[part, None])).squeeze(1)
            if gradient is not None:
                gradient[part] = _error(logits, total, targets[part]).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient, *((hidden, weight, targets) if weight.requires_grad else ()))
        return losses

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        gradient, *rest = ctx.saved_tensors
        inner = gradient * outer[:, None].to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return inner, _weight_gradient(outer, *rest) if rest else None, None, None


def _weight_gradient(
    outer: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros_like(weight, dtype=torch.float32)
    for part in _chunks(len(hidden), len(weight)):
        logits = F.linear(hidden[part], weight).float()
        error = _error(logits, logits.logsumexp(dim=-1, keepdim=True), targets[part]) * outer[part, None]
        total += error.to(weight.dtype).T @ hidden[part]
    return total.to(weight.dtype)


def _error(logits: torch.Tensor, total: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropy by the logits: probabilities, less one at the target. Takes the logits' place."""
    logits.sub_(total).exp_()
    logits[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    return logits


def _chunks(tokens: int, vocabulary: int) -> Any:
    size = max(1, CHUNK_LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))
