"""Rows in one sequence: which tokens are computed, what sees what, and that no architecture's numbers change by it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from trainers.child import packing
from trainers.child.data import IGNORED, Example
from trainers.child.loss import SummedLoss
from trainers.child.packing import packed, packs, padded, visible

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
GPT2: dict[str, Any] = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def row(*ids: int, asked: int = 1) -> Example:
    """Loss on all but the first `asked` tokens."""
    return Example(list(ids), [IGNORED] * asked + list(ids[asked:]))


def chat_like(count: int) -> list[Example]:
    """Rows of different lengths that begin with the same five tokens, the first one twice."""
    draw = random.Random(0)
    prompt = [draw.randrange(300) for _ in range(5)]
    rows = [row(*prompt, *(draw.randrange(300) for _ in range(3 + 4 * i)), asked=6) for i in range(count)]
    return [*rows, rows[0]]


def make_model(kind: str, **fields: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**fields)).eval()


def plain_losses(model: Any, examples: list[Example]) -> torch.Tensor:
    """Each row by itself through the model's own forward pass."""
    losses = []
    for one in examples:
        logits = model(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum"))
    return torch.stack(losses)


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_what_rows_begin_with_is_computed_once() -> None:
    piece = packed([row(1, 2, 3), row(1, 2, 4), row(5, 2, 3)], share=True)
    assert piece.ids == [[1, 2, 3, 4, 5, 2, 3]]
    assert piece.parents == [-1, 0, 1, 1, -1, 4, 5] and piece.positions == [0, 1, 2, 2, 0, 1, 2]
    assert list(zip(piece.rows, piece.sources, piece.targets, strict=True)) == [
        (0, 0, 2), (0, 1, 3), (1, 0, 2), (1, 1, 4), (2, 4, 2), (2, 5, 3),
    ]  # fmt: skip


def test_without_sharing_every_token_is_there() -> None:
    piece = packed([row(1, 2), row(1, 2)], share=False)
    assert piece.ids == [[1, 2, 1, 2]] and piece.parents == [-1, 0, -1, 2] and piece.sources == [0, 2]


def test_a_place_sees_what_comes_before_it_in_its_row() -> None:
    seen = visible([-1, 0, 1, 1, -1, 4])
    assert [list(np.flatnonzero(one)) for one in seen] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [4, 5]]


def test_padded_rows_ask_at_the_same_tokens() -> None:
    piece = padded([row(1, 2, 3, asked=2), row(4)], pad=9)
    assert piece.ids == [[1, 2, 3], [4, 9, 9]] and (piece.sources, piece.targets, piece.rows) == ([1], [3], [0])
    assert padded([], pad=9).ids == [[9, 9]] and padded([], pad=9).sources == []


def test_a_batch_is_cut_by_tokens_and_rows_alike_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKED_TOKENS", 10)
    lengths = dict(enumerate([4, 4, 4, 30, 1, 1, 1]))
    assert packs(range(7), lengths, 1) == [[[0, 1], [2], [3], [4, 5, 6]]]
    assert packs(range(7), lengths, 1, size=2) == [[[0, 1], [2], [3], [4, 5], [6]]]
    ranks = packs(range(7), lengths, 2)
    assert ranks == [[[0, 2, 4, 6], []], [[1], [3, 5]]] or len({len(pieces) for pieces in ranks}) == 1
    assert sorted(row for pieces in ranks for piece in pieces for row in piece) == list(range(7))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Llama", {**SHAPE, "tie_word_embeddings": True}),
        ("Qwen2", SHAPE),
        ("Qwen3", SHAPE),
        ("Mistral", {**SHAPE, "sliding_window": 64}),
        ("Gemma", SHAPE),
        ("Gemma2", {**SHAPE, "final_logit_softcapping": 3.0, "attn_logit_softcapping": None}),
        ("GPT2", {**GPT2, **NO_DROPOUT}),
    ],
)
def test_packed_rows_have_the_losses_and_gradients_of_single_ones(kind: str, fields: dict[str, Any]) -> None:
    """In fp32 to 1e-5 of each row's loss and of each parameter's gradient."""
    model, examples = make_model(kind, **fields), chat_like(4)
    loss = SummedLoss(model)
    loss.find_shortcuts(max_seq_len=max(len(one.ids) for one in examples))
    assert loss.packs and loss.splits == (kind != "Gemma2")
    alone = plain_losses(model, examples)
    wanted = gradients(model, alone.sum())
    piece = loss.piece(examples, pad=0)
    assert len(piece.ids[0]) == 5 + 3 + 7 + 11 + 15  # five tokens of each row, and one row, are computed once
    for one in (piece, packed(examples, share=False), padded(examples, 0)):
        found = loss(one, len(examples))
        assert torch.allclose(found, alone, rtol=1e-5)
        for name, gradient in gradients(model, found.sum()).items():
            assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_rows_beyond_a_sliding_window_are_not_packed() -> None:
    loss = SummedLoss(make_model("Mistral", **SHAPE, sliding_window=16))
    loss.find_shortcuts(max_seq_len=17)
    assert loss.splits and not loss.packs


def test_an_architecture_that_looks_beyond_the_mask_is_not_packed() -> None:
    model = make_model("Llama", **SHAPE)
    norm = model.model.norm
    norm.register_forward_hook(lambda module, inputs, output: output + output.mean(dim=1, keepdim=True))
    loss = SummedLoss(model)
    loss.find_shortcuts(max_seq_len=9)
    assert not loss.packs and loss.piece(chat_like(2), pad=0).parents is None


def test_with_dropout_rows_share_nothing() -> None:
    loss = SummedLoss(make_model("GPT2", **GPT2))
    loss.find_shortcuts(max_seq_len=9)
    assert loss.packs and len(loss.piece([row(1, 2), row(1, 2)], pad=0).ids[0]) == 4


def test_one_row_alone_has_no_mask() -> None:
    loss = SummedLoss(make_model("Llama", **SHAPE))
    loss.find_shortcuts(max_seq_len=9)
    assert loss.packs and loss.piece([row(1, 2)], pad=0).parents is None


def test_packing_can_be_declined() -> None:
    loss = SummedLoss(make_model("Llama", **SHAPE))
    loss.find_shortcuts(packing=False)
    assert loss.splits and not loss.packs


def test_no_rows_keep_the_graph() -> None:
    loss = SummedLoss(make_model("Llama", **SHAPE))
    loss.find_shortcuts()
    piece = loss.piece([], pad=0)
    assert float(loss(piece).detach()) == 0.0 and loss(piece, 2).tolist() == [0.0, 0.0]
    assert set(gradients(loss.model, loss(piece)))
