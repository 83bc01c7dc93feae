"""Texts with labels as token ids and class numbers, and the model that tells the classes apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from trainers.child.data import IGNORED, MAX_AUTO_TOKENS, Example
from trainers.child.failure import TrainFailure
from trainers.child.model import (
    Loaded,
    adapt,
    load_tokenizer,
    load_weights,
    quantized,
    resolve_precision,
    weights_folder,
)
from trainers.child.parted import parted_loading
from trainers.child.rows import count_long, numbers_of
from trainers.config import Hyperparams, TrainConfig

Row = Mapping[str, Any]
HEADS = ("score", "classifier", "pre_classifier")
"""What transformers calls the layers between the last hidden state and the classes."""

MAX_TOKENIZER_LIMIT = 1 << 20
"""A tokenizer that knows no limit says 10^30."""


@dataclass(frozen=True)
class Labelled:
    """`label`: the number of its class."""

    text: str
    ids: list[int]
    label: int


@dataclass(frozen=True)
class LabelledRows:
    """As `trainers.child.data.Encoded`."""

    examples: list[Labelled]
    max_seq_len: int
    truncated: int = 0
    dropped: int = 0


def names_of(rows: Sequence[Row]) -> list[str]:
    """Every label once; numbers in their order, before texts in theirs. A class's number is its place.
    Raises TrainFailure when there is nothing to tell apart."""
    found = {row["label"] for row in rows}
    names = [str(label) for label in sorted(found, key=lambda label: (isinstance(label, str), label))]
    if len(set(names)) < max(2, len(names)):
        message = f"The rows have {len(set(names))} different labels (a number and the same number as text are one)."
        raise TrainFailure("labels_unusable", message, hint="A classifier needs at least two labels, all of one type.")
    return names


def encode_texts(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    """As the tokenizer has them, its special tokens included; without loss."""
    encoded = tokenizer([row["text"] for row in rows])["input_ids"] if rows else []
    return [Example(list(ids), [IGNORED] * len(ids)) for ids in encoded]


def encode_labelled(
    rows: Sequence[Row],
    names: Sequence[str],
    loaded: Loaded,
    hyper: Hyperparams,
    examples: Sequence[Example] | None = None,
) -> LabelledRows:
    """`examples`: the rows by `encode_texts`, where they are known. Raises TrainFailure for a label that is none of `names`."""
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [number for number, row in zip(numbers_of(rows), rows, strict=True) if str(row["label"]) not in numbers]
    if unknown:
        raise TrainFailure(
            "label_unknown",
            f"{len(unknown)} rows have a label that no training row has; the first is row {unknown[0]}.",
            hint="Labels to validate on must occur among the rows to train on.",
        )
    examples = encode_texts(rows, loaded.tokenizer) if examples is None else examples
    whole = [
        Labelled(row["text"], example.ids, numbers[str(row["label"])])
        for row, example in zip(rows, examples, strict=True)
    ]
    limit = _limit(whole, hyper, loaded)
    long = count_long([len(one.ids) for one in whole], limit, hyper.overlength, numbers_of(rows))
    kept = [one for one in whole if len(one.ids) <= limit] if hyper.overlength == "drop" else whole
    cut = _cut(kept, limit, loaded.tokenizer)
    if not cut:
        raise TrainFailure("no_rows_left", "Every row is too long.", hint="Raise max_seq_len, or truncate.")
    return LabelledRows(cut, limit, long, len(whole) - len(cut))


def _limit(examples: Sequence[Labelled], hyper: Hyperparams, loaded: Loaded) -> int:
    longest = max((len(one.ids) for one in examples), default=1)
    of_tokenizer = min(loaded.tokenizer.model_max_length, MAX_TOKENIZER_LIMIT)
    return min(hyper.max_seq_len or min(longest, MAX_AUTO_TOKENS), loaded.context or of_tokenizer, of_tokenizer)


def _cut(examples: Sequence[Labelled], limit: int, tokenizer: Any) -> list[Labelled]:
    """By the tokenizer, which keeps its special tokens."""
    texts = [one.text for one in examples if len(one.ids) > limit]
    short = iter(tokenizer(texts, truncation=True, max_length=limit)["input_ids"] if texts else ())
    return [replace(one, ids=list(next(short))) if len(one.ids) > limit else one for one in examples]


def load_classifier(config: TrainConfig, names: Sequence[str], device: str) -> Loaded:
    """The base with a head for these classes: new, drawn from the seed, or the one to go on with. Raises TrainFailure."""
    tokenizer, no_template = load_tokenizer(config.base_model)
    if no_template:
        tokenizer.chat_template = None
    precision = resolve_precision(config)
    full = config.training_type == "full"
    torch.manual_seed(config.hyperparams.seed)  # the same head on every rank
    with parted_loading(config, precision):
        model, found = load_weights(
            weights_folder(config), precision, AutoModelForSequenceClassification,
            id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
            ignore_mismatched_sizes=not config.resume_from, output_loading_info=True, **quantized(config, device),
        )  # fmt: skip
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.training_type != "qlora":
        model.to(device)
    if full:
        return Loaded(adapt(model, config), tokenizer, precision, False)
    new = _new_modules(model, found["missing_keys"])
    return Loaded(adapt(model, config, task_type="SEQ_CLS", modules_to_save=new), tokenizer, precision, False)


def _new_modules(model: Any, missing: Iterable[str]) -> list[str]:
    """What an adapter must bring along whole: the head, and what else the base does not have (BERT's pooler, where it was
    trained to fill in words). Names without the base's prefix."""
    names = {key.removeprefix(f"{model.base_model_prefix}.").split(".")[0] for key in missing}
    return sorted(names | {name for name, _ in model.named_children() if name in HEADS})
