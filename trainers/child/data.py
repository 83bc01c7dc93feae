"""From a file of canonical rows to token ids and labels, and from a step's number to its rows. No torch."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainers.child.failure import TrainFailure
from trainers.child.render import Rendered, Row, render
from trainers.config import Hyperparams

IGNORED = -100
"""The label of a token without loss, as torch's cross-entropy has it."""

MAX_AUTO_TOKENS = 4096
TOKENS_PER_FORWARD = 16384
"""Rows times tokens of a micro-batch that we choose ourselves."""


@dataclass(frozen=True)
class Example:
    """`labels[i]` is the token at i where it carries loss, else `IGNORED`."""

    ids: list[int]
    labels: list[int]

    @property
    def loss_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Encoded:
    """`max_seq_len`: as resolved. `truncated`, `dropped`: how many rows were too long, or lost every loss token by that."""

    examples: list[Example]
    max_seq_len: int
    truncated: int = 0
    dropped: int = 0


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def encode_row(row: Row, tokenizer: Any) -> Example:
    """Tokens of the whole row; loss on the tokens that begin inside a span."""
    rendered = render(row, tokenizer)
    if "prompt" in row or not getattr(tokenizer, "is_fast", False):
        return _encode_pieces(rendered, tokenizer)
    encoded = tokenizer(rendered.text, add_special_tokens=not rendered.templated, return_offsets_mapping=True)
    example = _labelled(encoded["input_ids"], encoded["offset_mapping"], rendered)
    return example if rendered.templated else _with_end(example, tokenizer)


def encode_rows(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """As `encode_row` for each of them. Conversations take one call of the tokenizer, which uses all threads that it may."""
    together = rows and getattr(tokenizer, "is_fast", False) and all("messages" in row for row in rows)
    if not together:
        return [encode_row(row, tokenizer) for row in rows]
    rendered = [render(row, tokenizer) for row in rows]
    encoded = tokenizer([one.text for one in rendered], add_special_tokens=False, return_offsets_mapping=True)
    return [_labelled(*one) for one in zip(encoded["input_ids"], encoded["offset_mapping"], rendered, strict=True)]


def _labelled(ids: Sequence[int], offsets: Sequence[tuple[int, int]], rendered: Rendered) -> Example:
    labels = [
        token if _begins_in(start, end, rendered.spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    return Example(list(ids), labels)


def _begins_in(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    return end > start and any(first <= start < last for first, last in spans)


def _encode_pieces(rendered: Rendered, tokenizer: Any) -> Example:
    """The text between spans tokenised by itself, as generation does with a prompt."""
    ids: list[int] = []
    labels: list[int] = []
    for text, carries_loss in _pieces(rendered):
        special = not rendered.templated and not ids
        piece = list(tokenizer(text, add_special_tokens=special)["input_ids"]) if text or special else []
        if special and piece and piece[-1] == tokenizer.eos_token_id:
            piece = piece[:-1]
        ids += piece
        labels += piece if carries_loss else [IGNORED] * len(piece)
    example = Example(ids, labels)
    return example if rendered.templated else _with_end(example, tokenizer)


def _pieces(rendered: Rendered) -> Iterator[tuple[str, bool]]:
    position = 0
    for start, end in rendered.spans:
        yield rendered.text[position:start], False
        yield rendered.text[start:end], True
        position = end
    yield rendered.text[position:], False


def _with_end(example: Example, tokenizer: Any) -> Example:
    end = tokenizer.eos_token_id
    if end is None or (example.ids and example.ids[-1] == end):
        return example
    return Example([*example.ids, end], [*example.labels, end])


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    hyper: Hyperparams,
    context: int | None,
    examples: Sequence[Example] | None = None,
) -> Encoded:
    """`context`: the longest sequence that the model takes; `examples`: the rows as tokens, where they are known. Raises
    TrainFailure when a row cannot be trained on."""
    examples = encode_rows(rows, tokenizer) if examples is None else examples
    empty = [number for number, example in enumerate(examples, 1) if example.loss_tokens == 0]
    if empty or not examples:
        raise _no_loss(empty, len(examples))
    limit = _limit(examples, hyper.max_seq_len, context)
    long = [number for number, example in enumerate(examples, 1) if len(example.ids) > limit]
    if long and hyper.overlength == "error":
        raise TrainFailure(
            "row_too_long",
            f"{len(long)} rows are longer than {limit} tokens, the first is row {long[0]}.",
            hint="Raise max_seq_len, shorten the rows, or set overlength to truncate or drop.",
        )
    if hyper.overlength == "drop":
        cut = [example for example in examples if len(example.ids) <= limit]
    else:
        cut = [Example(example.ids[:limit], example.labels[:limit]) for example in examples]
    kept = [example for example in cut if example.loss_tokens]
    if not kept:
        raise _no_loss(list(range(1, len(examples) + 1)), len(examples))
    return Encoded(kept, limit, truncated=len(long), dropped=len(examples) - len(kept))


def _limit(examples: Sequence[Example], asked: int | None, context: int | None) -> int:
    longest = max(len(example.ids) for example in examples)
    limit = asked if asked is not None else min(longest, MAX_AUTO_TOKENS)
    return min(limit, context) if context else limit


def _no_loss(numbers: Sequence[int], rows: int) -> TrainFailure:
    if not rows:
        return TrainFailure("no_loss_tokens", "The data has no rows.", hint="Upload a dataset with at least one row.")
    first = ", ".join(str(number) for number in numbers[:5])
    return TrainFailure(
        "no_loss_tokens",
        f"{len(numbers)} of {rows} rows have no token to learn from (rows {first}{', …' if len(numbers) > 5 else ''}).",
        hint="Each row needs an assistant turn with weight 1, a completion or a text that is not empty and fits max_seq_len.",
    )


@dataclass(frozen=True)
class Plan:
    """Which rows a step trains on, and with what learning rate: a function of the step's number alone, so that a run that
    resumes needs nothing but the number. Steps count from 1."""

    rows: int
    hyper: Hyperparams

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.hyper.batch_size)

    @property
    def steps(self) -> int:
        return self.hyper.max_steps or self.hyper.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> float:
        """How many epochs are done after `step`."""
        return step / self.steps_per_epoch

    def batch(self, step: int) -> list[int]:
        """Row numbers from 0; the last batch of an epoch may be short."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        size = self.hyper.batch_size
        return list(_order(self.rows, self.hyper.seed, epoch)[place * size : (place + 1) * size])

    def lr(self, step: int) -> float:
        warmup = math.ceil(self.hyper.warmup_ratio * self.steps)
        if step <= warmup:
            return self.hyper.lr * step / warmup
        done = (step - 1 - warmup) / max(1, self.steps - warmup)
        if self.hyper.lr_scheduler == "cosine":
            return self.hyper.lr * 0.5 * (1 + math.cos(math.pi * done))
        return self.hyper.lr * (1 - done) if self.hyper.lr_scheduler == "linear" else self.hyper.lr


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # a text is hashed with SHA-512: the same on every machine
    return tuple(order)


def micro_batches(batch: Sequence[int], rank: int, world_size: int, size: int) -> list[list[int]]:
    """This rank's rows of a batch in pieces of `size`. Every rank gets equally many pieces; the last ones may be empty."""
    share = list(batch[rank::world_size])
    pieces = math.ceil(math.ceil(len(batch) / world_size) / size)
    return [share[i * size : (i + 1) * size] for i in range(pieces)]


def micro_batch_size(hyper: Hyperparams, world_size: int, max_seq_len: int) -> int:
    share = math.ceil(hyper.batch_size / world_size)
    return max(1, min(share, hyper.micro_batch_size or TOKENS_PER_FORWARD // max_seq_len))
