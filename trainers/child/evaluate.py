"""How good a model is on rows that it does not train on: loss, and the share of questions that it answers exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trainers.child.control import Control
from trainers.child.data import IGNORED, TOKENS_PER_FORWARD, Encoded, Example, encode, encode_row
from trainers.child.loss import SummedLoss
from trainers.child.model import Loaded
from trainers.child.packing import PACKED_TOKENS
from trainers.child.parted import is_parted
from trainers.child.render import Row, question
from trainers.child.samples import samples
from trainers.child.token_cache import Progress, TokenCache
from trainers.child.world import World
from trainers.config import TrainConfig

MAX_BATCH = 16
TURN_END = "<|im_end|>"
"""Plain text for a tokenizer that does not know it, where ChatML was added to a base model."""


@dataclass(frozen=True)
class Asked:
    """A question as tokens. `expected` is stripped; `answer_tokens` says how long it is."""

    prompt: str
    ids: list[int]
    expected: str
    answer_tokens: int


@dataclass(frozen=True)
class Validation:
    """`ends`: tokens that end an answer."""

    encoded: Encoded
    asked: list[Asked]
    ends: list[int]


def make_validation(
    rows: Sequence[Row], loaded: Loaded, config: TrainConfig, cache: TokenCache, tell: Progress
) -> Validation:
    """Raises TrainFailure when no row carries loss."""
    hyper = dataclasses.replace(config.hyperparams, overlength="truncate")
    examples = cache.encode(rows, loaded.tokenizer, tell)
    encoded = encode(rows, loaded.tokenizer, hyper, loaded.context, examples)
    chosen = rows[: config.exact_match_rows]
    room = (loaded.context or 1 << 30) - config.max_new_tokens
    asked = [one for row in chosen if (one := _ask(row, loaded.tokenizer)) is not None and len(one.ids) <= room]
    return Validation(encoded, asked, _ends(chosen, loaded))


def _ask(row: Row, tokenizer: Any) -> Asked | None:
    found = question(row, tokenizer)
    if found is None:
        return None
    ids = list(tokenizer(found.prompt, add_special_tokens=not found.templated)["input_ids"])
    if not found.templated and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    answer = tokenizer(found.expected, add_special_tokens=False)["input_ids"]
    return Asked(found.prompt, ids, found.expected.strip(), len(answer)) if ids else None


def _ends(rows: Sequence[Row], loaded: Loaded) -> list[int]:
    """The tokenizer's and the model's end of text, and the special token with which the chat template ends a turn."""
    tokenizer = loaded.tokenizer
    of_model = loaded.model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None}
    for row in rows[:1]:
        last = [label for label in encode_row(row, tokenizer).labels if label != IGNORED][-1:]
        ends.update(token for token in last if token in tokenizer.all_special_ids)
    return sorted(ends)


class Evaluator:
    """Leaves the model in training mode and draws no random number. Ranks with parts of the weights answer `_together`: each asks
    the others for its part of a layer, also when it has nothing left to answer itself."""

    def __init__(self, loss: SummedLoss, loaded: Loaded, config: TrainConfig, world: World, control: Control) -> None:
        self._loss = loss
        self._tokenizer = loaded.tokenizer
        self._config = config
        self._world = world
        self._control = control
        self._together = world.size > 1 and any(is_parted(weight) for weight in loaded.model.parameters())

    @torch.no_grad()
    def run(self, validation: Validation) -> dict[str, Any]:
        """The fields of an `evaluated` message but step and when; the same on all ranks, samples on rank 0 only.
        Raises Stopped."""
        self._loss.eval()
        fields: dict[str, Any] = {"loss": self._mean_loss(validation.encoded), "rows": len(validation.encoded.examples)}
        if validation.asked:
            fields["exact_match"] = self._exact_match(validation)
            fields["samples"] = self._samples(validation)
        self._loss.train()
        return fields

    def _mean_loss(self, encoded: Encoded) -> float:
        examples = sorted(encoded.examples, key=lambda example: len(example.ids))
        # logits that must exist whole are large: as few at a time as in training
        room = TOKENS_PER_FORWARD if self._loss.splits and not self._loss.packs else PACKED_TOKENS
        size = max(1, min(MAX_BATCH, room // encoded.max_seq_len))
        batches = self._batches(len(examples), size, "evaluation, rows")
        total = sum(self._summed([examples[i] for i in batch]) for batch in batches)
        return self._world.sum(total)[0] / sum(example.loss_tokens for example in examples)

    def _summed(self, examples: Sequence[Example]) -> float:
        return float(self._loss(self._loss.piece(examples, self._tokenizer.pad_token_id)))

    def _exact_match(self, validation: Validation) -> float:
        ordered = sorted(validation.asked, key=lambda one: len(one.ids))
        right = 0
        for batch in self._batches(len(ordered), MAX_BATCH, "evaluation, answers"):
            asked = [ordered[i] for i in batch]
            # no longer than it takes to see whether an answer is the expected one
            limit = max((one.answer_tokens for one in asked), default=0) + 2
            answers = self._answers(asked, validation.ends, limit)
            right += sum(answer == one.expected for answer, one in zip(answers, asked, strict=True))
        return self._world.sum(right)[0] / len(ordered)

    def _samples(self, validation: Validation) -> list[dict[str, str]]:
        if self._world.rank != 0 and not self._together:
            return []
        shown = validation.asked[: self._config.sample_rows]
        answers = self._answers(shown, validation.ends, self._config.max_new_tokens)
        return samples([(one.prompt, one.expected, answer) for one, answer in zip(shown, answers, strict=True)])

    def _batches(self, rows: int, size: int, what: str) -> Iterator[list[int]]:
        """This rank's share. Every rank gets equally many batches, the last ones may be empty."""
        share = list(range(rows))[self._world.rank :: self._world.size]
        for start in range(0, math.ceil(rows / self._world.size), size):
            self._control.between()
            yield share[start : start + size]
            self._control.progress(what, min(rows, (start + size) * self._world.size), rows)

    def _answers(self, asked: Sequence[Asked], ends: list[int], limit: int) -> list[str]:
        """Greedy answers of at most `limit` tokens, stripped."""
        if not asked and not self._together:
            return []
        pad, width = self._tokenizer.pad_token_id, max((len(one.ids) for one in asked), default=1)
        ids = torch.tensor([[pad] * (width - len(one.ids)) + one.ids for one in asked] or [[pad]])
        mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in asked] or [[1]])
        with _laid_out(self._loss.model.get_output_embeddings()):
            out = self._loss.model.generate(
                input_ids=ids.to(self._world.device),
                attention_mask=mask.to(self._world.device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=min(limit, self._config.max_new_tokens),
                    pad_token_id=pad,
                    eos_token_id=ends or None,
                ),
                stopping_criteria=StoppingCriteriaList([_Telling(self._control)]),
                synced_gpus=self._together,
            )
        texts = self._tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)[: len(asked)]
        return [text.strip().removesuffix(TURN_END).strip() for text in texts]


class _Telling(StoppingCriteria):
    """Stops nothing: asked after each token of a batch of answers, which may take long."""

    def __init__(self, control: Control) -> None:
        self._control = control

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._control.progress("evaluation, tokens of the answers", input_ids.shape[1], 0)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextlib.contextmanager
def _laid_out(head: Any) -> Iterator[None]:
    """Within it the head reads states that lie in a row. Those of the last places, as they are cut out of all, make torch multiply
    by a copy of the weights for each row of the batch (in bf16 on a CPU; sixteen times the head)."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: tuple(one.contiguous() for one in inputs))
    try:
        yield
    finally:
        hook.remove()
