"""Cross-entropy in chunks against torch's own on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trainers.child import head
from trainers.child.head import token_losses

WEIGHTS = torch.linspace(0.5, 2.0, 11)
"""Each token's own weight in the sum, as a preference loss has it."""


def both(dtype: torch.dtype, learns: bool) -> list[tuple[torch.Tensor, ...]]:
    """(losses, gradient of the hidden states, gradient of the matrix): ours, torch's."""
    torch.manual_seed(0)
    states, matrix, targets = torch.randn(11, 8), torch.nn.Linear(8, 50, bias=False), torch.randint(50, (11,))
    matrix.to(dtype).requires_grad_(learns)
    found = []
    for ours in (True, False):
        hidden = states.to(dtype).requires_grad_()
        matrix.zero_grad()
        whole = F.cross_entropy(matrix(hidden).float(), targets, reduction="none")
        losses = token_losses(hidden, matrix, targets) if ours else whole
        (losses * WEIGHTS).sum().backward()
        assert hidden.grad is not None
        found.append((losses.detach(), hidden.grad, *([matrix.weight.grad] if learns else [])))
    return found


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_give_the_losses_and_gradients_of_the_whole(
    chunk: int, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 50 * chunk)
    ours, theirs = both(torch.float32, learns)
    assert len(ours) == len(theirs) == 2 + learns
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-6) for one, other in zip(ours, theirs, strict=True))


def test_in_bfloat16_they_agree_but_for_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_LOGITS", 50 * 4)
    ours, theirs = both(torch.bfloat16, True)
    assert ours[0].dtype == torch.float32 and torch.allclose(ours[0], theirs[0], rtol=1e-6)
    assert all((one - other).norm() <= 1e-2 * other.norm() for one, other in zip(ours[1:], theirs[1:], strict=True))


def test_a_head_with_a_bias_goes_whole() -> None:
    torch.manual_seed(0)
    hidden, matrix, targets = torch.randn(3, 8), torch.nn.Linear(8, 50), torch.tensor([1, 2, 3])
    assert torch.equal(
        token_losses(hidden, matrix, targets), F.cross_entropy(matrix(hidden), targets, reduction="none")
    )


def test_no_gradient_is_worked_out_where_none_is_asked_for() -> None:
    hidden, matrix = torch.randn(3, 8, requires_grad=True), torch.nn.Linear(8, 50, bias=False)
    with torch.no_grad():
        assert not token_losses(hidden, matrix, torch.tensor([1, 2, 3])).requires_grad
