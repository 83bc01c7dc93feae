"""Pairs of a better and a worse answer: as tokens, as log-probabilities, and the loss of direct preference optimisation
(arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from trainers.child.data import MAX_AUTO_TOKENS, Example, encode_rows
from trainers.child.failure import TrainFailure
from trainers.child.rows import FileRow, count_long, numbers_of
from trainers.config import Hyperparams

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    chosen: Example
    rejected: Example

    @property
    def tokens(self) -> int:
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        return max(len(self.chosen.ids), len(self.rejected.ids))

    @property
    def learnable(self) -> bool:
        return self.chosen.loss_tokens > 0 and self.rejected.loss_tokens > 0

    def cut(self, limit: int) -> Pair:
        return Pair(*(Example(one.ids[:limit], one.labels[:limit]) for one in (self.chosen, self.rejected)))


@dataclass(frozen=True)
class Pairs:
    """As `trainers.child.data.Encoded`."""

    pairs: list[Pair]
    max_seq_len: int
    truncated: int = 0
    dropped: int = 0


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    hyper: Hyperparams,
    context: int | None,
    examples: Sequence[Example] | None = None,
) -> Pairs:
    """Both sides with loss on the answer only. `examples`: `all_sides` as tokens, where they are known. Raises TrainFailure when
    nothing can be learned from a row."""
    examples = encode_rows(all_sides(rows), tokenizer) if examples is None else examples
    pairs = [Pair(*both) for both in zip(examples[::2], examples[1::2], strict=True)]
    numbers = numbers_of(rows)
    for number, pair in zip(numbers, pairs, strict=True):
        if not pair.learnable:
            raise _no_answer(f"Row {number} has a side without a token to learn from.")
    limit = min(hyper.max_seq_len or MAX_AUTO_TOKENS, max((pair.longest for pair in pairs), default=1))
    limit = min(limit, context) if context else limit
    long = count_long([pair.longest for pair in pairs], limit, hyper.overlength, numbers)
    fitting = [pair for pair in pairs if pair.longest <= limit] if hyper.overlength == "drop" else pairs
    kept = [pair for pair in (pair.cut(limit) for pair in fitting) if pair.learnable]
    if not kept:
        raise _no_answer("No row has an answer left on both sides.")
    return Pairs(kept, limit, long, len(pairs) - len(kept))


def _no_answer(message: str) -> TrainFailure:
    hint = "Each row needs a chosen and a rejected answer that are not empty and fit max_seq_len."
    return TrainFailure("no_loss_tokens", message, hint=hint)


def all_sides(rows: Sequence[Row]) -> list[FileRow]:
    """chosen, rejected, chosen, rejected …, each with the number of its row."""
    return [FileRow(side, number) for number, row in zip(numbers_of(rows), rows, strict=True) for side in sides(row)]


def sides(row: Row) -> tuple[Row, Row]:
    """(chosen, rejected) as rows of their own. Where there is no prompt, it is what both sides begin with alike."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str):
        start = 0 if "prompt" in row else _common_text(chosen, rejected)
        prompt = row.get("prompt", chosen[:start])
        return {"prompt": prompt, "completion": chosen[start:]}, {"prompt": prompt, "completion": rejected[start:]}
    start = 0 if "prompt" in row else _common(chosen, rejected)
    before = [_unlearned(turn) for turn in row.get("prompt", chosen[:start])]
    return {"messages": [*before, *chosen[start:]]}, {"messages": [*before, *rejected[start:]]}


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with; at least one is left on each side."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), max(0, most))


def _common_text(one: str, other: str) -> int:
    """As `_common`, in characters, and without the space before the first word that differs: it belongs to that word."""
    end = _common(one, other)
    return end - 1 if end and one[end - 1] == " " else end


def _unlearned(turn: Row) -> Row:
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn


def flat(pairs: Sequence[Pair]) -> list[Example]:
    """chosen, rejected, chosen, rejected …"""
    return [side for pair in pairs for side in (pair.chosen, pair.rejected)]


@dataclass(frozen=True)
class Margins:
    """Of some pairs: how much more the model prefers the chosen answer than its reference does, times beta; one each."""

    values: torch.Tensor

    def loss(self) -> torch.Tensor:
        """Summed over the pairs."""
        return -F.logsigmoid(self.values).sum()

    def measures(self) -> torch.Tensor:
        """[loss; pairs in which the chosen answer has the higher reward; margins], each summed over the pairs."""
        values = self.values.detach()
        return torch.stack((-F.logsigmoid(values).sum(), (values > 0).sum().to(values), values.sum())).double()


def margins(log_probs: torch.Tensor, reference: torch.Tensor, beta: float) -> Margins:
    """Both [pairs, 2]: log-probabilities of the chosen and of the rejected answer, summed over its tokens."""
    moved = log_probs - reference
    return Margins(beta * (moved[:, 0] - moved[:, 1]))
