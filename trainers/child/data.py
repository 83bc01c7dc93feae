"""From a file of canonical rows to token ids and labels, and from a step's number to its rows. No torch."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainers.child.failure import TrainFailure, describe
from trainers.child.render import Rendered, Row, render
from trainers.child.rows import count_long, numbers_of
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
    return encode_rows([row], tokenizer)[0]


def encode_rows(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """All in a few calls of the tokenizer, which uses all threads that it may. Raises TrainFailure, which names the row."""
    rendered = [_rendered(row, number, tokenizer) for row, number in zip(rows, numbers_of(rows), strict=True)]
    parted = ["prompt" in row or not getattr(tokenizer, "is_fast", False) for row in rows]
    together = list(zip(rendered, parted, strict=True))
    pieces = iter(_encode_pieces([one for one, apart in together if apart], tokenizer))
    wholes = iter(_encode_whole([one for one, apart in together if not apart], tokenizer))
    examples = [(one, next(pieces if apart else wholes)) for one, apart in together]
    return [example if one.templated else _with_end(example, tokenizer) for one, example in examples]


def _rendered(row: Row, number: int, tokenizer: Any) -> Rendered:
    try:
        return render(row, tokenizer)
    except Exception as error:
        failure = describe(error)
        if failure.code != "row_not_renderable":
            raise
        raise TrainFailure(failure.code, f"Row {number}: {failure.message}", hint=failure.hint) from error


def _encode_whole(rendered: Sequence[Rendered], tokenizer: Any) -> list[Example]:
    texts = [(one.text, not one.templated) for one in rendered]
    encoded = _tokenised(texts, tokenizer, return_offsets_mapping=True)
    return [_labelled(*tokens, one) for tokens, one in zip(encoded, rendered, strict=True)]


def _tokenised(texts: Sequence[tuple[str, bool]], tokenizer: Any, **options: Any) -> list[tuple[Any, Any]]:
    """(ids, offsets where they were asked for) of each (text, whether the tokenizer adds its special tokens)."""
    found: dict[int, tuple[Any, Any]] = {}
    for special in (False, True):
        places = [place for place, text in enumerate(texts) if text[1] is special]
        if places:
            encoded = tokenizer([texts[place][0] for place in places], add_special_tokens=special, **options)
            offsets = encoded.get("offset_mapping") or [None] * len(places)
            found.update(zip(places, zip(encoded["input_ids"], offsets, strict=True), strict=True))
    return [found[place] for place in range(len(texts))]


def _labelled(ids: Sequence[int], offsets: Sequence[tuple[int, int]], rendered: Rendered) -> Example:
    labels = [
        token if _begins_in(start, end, rendered.spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    return Example(list(ids), labels)


def _begins_in(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    return end > start and any(first <= start < last for first, last in spans)


def _encode_pieces(rendered: Sequence[Rendered], tokenizer: Any) -> list[Example]:
    """The text between spans tokenised by itself, as generation does with a prompt."""
    if not rendered:
        return []
    nothing = list(tokenizer("")["input_ids"])
    bare = nothing in ([], [tokenizer.eos_token_id])
    pieces = [list(_pieces(one, bare)) for one in rendered]
    texts = [(piece.text, piece.begins) for one in pieces for piece in one]
    encoded = iter(_tokenised(texts, tokenizer))
    return [_joined([(piece, list(next(encoded)[0])) for piece in one], tokenizer) for one in pieces]


@dataclass(frozen=True)
class _Piece:
    """`begins`: special tokens stand before it."""

    text: str
    begins: bool
    carries_loss: bool


def _joined(pieces: Sequence[tuple[_Piece, list[int]]], tokenizer: Any) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for piece, tokens in pieces:
        if piece.begins and tokens and tokens[-1] == tokenizer.eos_token_id:
            tokens = tokens[:-1]
        ids += tokens
        labels += tokens if piece.carries_loss else [IGNORED] * len(tokens)
    return Example(ids, labels)


def _pieces(rendered: Rendered, bare: bool) -> Iterator[_Piece]:
    """A row that is no conversation begins with the tokenizer's special tokens, also where its first piece is empty. `bare`: it has
    none to begin with."""
    edges = [0, *(edge for span in rendered.spans for edge in span), len(rendered.text)]
    for number, (start, end) in enumerate(pairwise(edges)):
        begins = not rendered.templated and start == 0 and (number == 0 or bare)
        if begins or start < end:
            yield _Piece(rendered.text[start:end], begins, carries_loss=number % 2 == 1)


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
    numbers = numbers_of(rows)
    empty = [number for number, example in zip(numbers, examples, strict=True) if example.loss_tokens == 0]
    if empty or not examples:
        raise _no_loss(empty, len(examples))
    limit = _limit(examples, hyper.max_seq_len, context)
    long = count_long([len(example.ids) for example in examples], limit, hyper.overlength, numbers)
    if hyper.overlength == "drop":
        cut = [example for example in examples if len(example.ids) <= limit]
    else:
        cut = [Example(example.ids[:limit], example.labels[:limit]) for example in examples]
    kept = [example for example in cut if example.loss_tokens]
    if not kept:
        raise _no_loss(numbers, len(examples))
    return Encoded(kept, limit, truncated=long, dropped=len(examples) - len(kept))


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
