"""Attention row by row against torch's own under a dense mask: the same states and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders_llama import make_tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.child import row_attention
from trainers.child.data import Example
from trainers.child.loss import SummedLoss
from trainers.child.packing import Piece, packed, visible
from trainers.child.row_attention import attend, flash, places_of

Attend = Callable[..., tuple[torch.Tensor, None]]
WIDTH = 8
ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5)


def piece_of(rows: list[list[int]]) -> Piece:
    return packed([Example(row, [-100, *row[1:]]) for row in rows], share=True)


def dense(piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    assert piece.parents is not None
    mask = torch.from_numpy(visible(piece.parents))
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[None, None]


def both_ways(
    piece: Piece, heads: int, key_heads: int, dtype: torch.dtype, attend: Attend = attend
) -> tuple[list[torch.Tensor], ...]:
    """By rows, and under the mask: the output, and the gradients of query, key and value."""
    places, generator = len(piece.ids[0]), torch.Generator().manual_seed(1)
    drawn = [
        torch.randn(1, places, count, WIDTH, generator=generator) for count in (heads, key_heads, key_heads, heads)
    ]
    module = SimpleNamespace(num_key_value_groups=heads // key_heads, is_causal=True, training=True)
    found = []
    assert piece.paths is not None
    for mask in (places_of(piece.paths), dense(piece, dtype)):
        states = [one.to(dtype).transpose(1, 2).clone().requires_grad_() for one in drawn[:3]]
        out, _ = attend(module, *states, mask, scaling=0.3)
        out.backward(drawn[3].to(dtype))
        found.append([out.detach(), *(one.grad for one in states if one.grad is not None)])
    return tuple(found)


def on_an_accelerator(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **more: float
) -> tuple[torch.Tensor, None]:
    """Its way, on a CPU."""
    if mask.dtype != torch.long:
        return attend(module, query, key, value, mask, **more)
    return flash(query, key, value, mask[0, 0], more["scaling"]), None


WAYS = pytest.mark.parametrize("way", [attend, on_an_accelerator])


@WAYS
@given(rows=ROWS, heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_states_and_gradients_are_those_under_a_mask(
    way: Attend, rows: list[list[int]], heads: tuple[int, int]
) -> None:
    ours, theirs = both_ways(piece_of(rows), *heads, torch.float32, way)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@WAYS
def test_in_bfloat16_they_differ_by_rounding(way: Attend) -> None:
    piece = piece_of([[1, 2, 3, *range(n, n + 20)] for n in range(4, 60, 7)])
    exact, _ = both_ways(piece, 4, 2, torch.float32)
    ours, theirs = both_ways(piece, 4, 2, torch.bfloat16, way)
    for wanted, mine, other in zip(exact, ours, theirs, strict=True):
        off, torchs = (float((one.float() - wanted).norm() / wanted.norm()) for one in (mine, other))
        assert off < max(2.5 * torchs, 0.006)


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"softcap": 30.0}])
def test_what_it_does_not_know_is_refused(more: dict[str, float]) -> None:
    states = [torch.zeros(1, 2, 3, WIDTH) for _ in range(3)]
    with pytest.raises(ValueError, match="by rows"):
        attend(SimpleNamespace(), *states, places_of([[0, 1, 2]]), **more)


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    folder = make_tiny_llama(tmp_path / "tiny")
    made: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return made


def test_a_model_computes_the_same_and_is_saved_as_it_came(model: torch.nn.Module, tmp_path: Path) -> None:
    loss = SummedLoss(model)
    loss.find_shortcuts(packing=True, max_seq_len=64)
    assert loss.packs and loss.by_rows
    piece = piece_of([[1, 2, 3, *range(n, n + 20)] for n in range(4, 60, 7)])
    assert piece.spread < 1.0
    by_rows = loss(piece).detach()
    loss.by_rows = False
    assert float(by_rows) == pytest.approx(float(loss(piece).detach()), rel=1e-2)
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert row_attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "saved").vocab_size == model.config.vocab_size  # type: ignore[union-attr]


def test_a_long_beginning_of_all_rows_is_not_computed_for_each_of_them(model: torch.nn.Module) -> None:
    loss = SummedLoss(model)
    loss.find_shortcuts(packing=True, max_seq_len=64)
    piece = piece_of([[*range(1, 40), 50 + n] for n in range(6)])
    assert piece.spread > 1.0 and piece.parents is not None
    assert loss._mask(piece, piece.parents).dtype == torch.bfloat16


def test_in_float32_torchs_own_is_used(model: torch.nn.Module) -> None:
    loss = SummedLoss(model.float())
    loss.find_shortcuts(packing=True, max_seq_len=64)
    assert loss.packs and not loss.by_rows
