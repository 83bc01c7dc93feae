"""Sequence classification, read from top to bottom: labels, model, data, engine, then the session's loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from trainers.child.control import Control
from trainers.child.data import Plan, micro_batch_size, micro_batches
from trainers.child.engine import Engine, make_engine
from trainers.child.kernels import fuse
from trainers.child.labels import Labelled, LabelledRows, encode_labelled, encode_texts, load_classifier, names_of
from trainers.child.loss import sent
from trainers.child.memory import MemoryLimit
from trainers.child.rows import Rows, read_data
from trainers.child.samples import samples
from trainers.child.session import DataFacts, Fields, MicroBatch, Place, Session, update
from trainers.child.token_cache import TokenCache, telling
from trainers.child.world import World
from trainers.config import TrainConfig


def run(config: TrainConfig, world: World, control: Control, memory: MemoryLimit) -> None:
    """Trains to the end and leaves the artifact. Raises TrainFailure and Stopped."""
    rows, rows_held_out = read_data(config)
    names = names_of(rows if config.validation_file else [*rows, *rows_held_out])
    loaded = load_classifier(config, names, world.device)
    hyper = config.hyperparams
    cache = TokenCache.of(config, world.rank)

    def encoded(of: Rows) -> LabelledRows:
        texts = cache.encode([{"text": row["text"]} for row in of], loaded.tokenizer, telling(control), encode_texts)
        return encode_labelled(of, names, loaded, hyper, texts)

    data = encoded(rows)
    held_out = encoded(rows_held_out).examples if rows_held_out else []
    plan = Plan(len(data.examples), hyper)
    micro = micro_batch_size(hyper, world.size, data.max_seq_len)

    classifier = Classifier(loaded.model, loaded.tokenizer.pad_token_id)
    classifier.train()
    engine = make_engine(classifier, config, world, micro)
    loaded = fuse(loaded, config, world, control)
    torch.manual_seed(hyper.seed + world.rank)  # dropout differs from rank to rank

    trainer = _Trainer(classifier, engine, data.examples, plan, world, control, MicroBatch(micro))
    judge = _Judge(classifier, names, world, control, micro, config.sample_rows)
    evaluate = (lambda: judge.run(held_out)) if held_out else None
    session = Session(Place(config, world, control, memory), loaded, engine, plan, evaluate)
    session.open()
    session.run(trainer, _facts(data))


def _facts(data: LabelledRows) -> DataFacts:
    tokens = sum(len(one.ids) for one in data.examples)
    return DataFacts(len(data.examples), tokens, data.max_seq_len, data.truncated, data.dropped)


class Classifier(torch.nn.Module):
    """forward(examples) → logits [rows, classes] in fp32. No example: one row of padding, so that every rank runs every
    forward; its logits are not to be counted."""

    def __init__(self, model: Any, pad: int) -> None:
        super().__init__()
        self.model = model
        self._pad = pad

    def forward(self, examples: Sequence[Labelled]) -> torch.Tensor:
        length = max((len(one.ids) for one in examples), default=2)
        rows = [one.ids for one in examples] or [[self._pad]]
        ids = torch.tensor([row + [self._pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        device = self.model.device
        logits: torch.Tensor = self.model(input_ids=sent(ids, device), attention_mask=sent(mask, device)).logits
        return logits.float()

    def loss(self, examples: Sequence[Labelled]) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross-entropy summed over the rows; [that; rows that were told right], detached, in fp64."""
        logits = self(examples)
        if not examples:
            return logits.sum() * 0.0, logits.new_zeros(2, dtype=torch.float64)
        labels = sent(torch.tensor([one.label for one in examples]), logits.device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.detach().argmax(-1) == labels).sum()
        return loss, torch.stack((loss.detach().double(), right.double()))


@dataclass(frozen=True)
class _Trainer:
    """One optimizer step over a global batch."""

    classifier: Classifier
    engine: Engine
    examples: Sequence[Labelled]
    plan: Plan
    world: World
    control: Control
    micro: MicroBatch

    def step(self, step: int) -> Fields:
        """The loss is the mean over the rows of the global batch."""
        batch, lr = self.plan.batch(step), self.plan.lr(step)
        pieces = micro_batches(batch, self.world.rank, self.world.size, self.micro.size)
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for number, rows in enumerate(pieces, 1):
            loss, measured = self.classifier.loss([self.examples[row] for row in rows])
            self.engine.backward(loss / len(batch), last=number == len(pieces))
            sums += measured
            self.control.progress(f"step {step}, forward passes", number, len(pieces))
        mean, right = self.world.total(sums) / len(batch)
        norm = update(self.engine, lr)
        tokens = sum(len(self.examples[row].ids) for row in batch)
        return {"loss": mean, "lr": lr, "grad_norm": norm, "tokens": tokens, "accuracy": right}


@dataclass(frozen=True)
class _Judge:
    """Leaves the model in training mode and draws no random number."""

    classifier: Classifier
    names: Sequence[str]
    world: World
    control: Control
    micro: int
    shown: int

    @torch.no_grad()
    def run(self, examples: Sequence[Labelled]) -> Fields:
        """{loss, accuracy, rows, samples}. Raises Stopped."""
        self.classifier.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in self._batches(examples):
            sums += self.classifier.loss(batch)[1]
        loss, accuracy = (self.world.total(sums) / len(examples)).tolist()
        samples = self._samples(examples[: self.shown])
        self.classifier.train()
        return {"loss": loss, "accuracy": accuracy, "rows": len(examples), "samples": samples}

    def _batches(self, examples: Sequence[Labelled]) -> Iterator[list[Labelled]]:
        """This rank's share; every rank gets equally many batches."""
        share = examples[self.world.rank :: self.world.size]
        for start in range(0, math.ceil(len(examples) / self.world.size), self.micro):
            self.control.between()
            yield list(share[start : start + self.micro])
            done = min(len(examples), (start + self.micro) * self.world.size)
            self.control.progress("evaluation, rows", done, len(examples))

    def _samples(self, examples: Sequence[Labelled]) -> list[dict[str, str]]:
        """Asked on all ranks, which may need each other's part of the weights; told by the first."""
        told = self.classifier(examples).argmax(-1)[: len(examples)]
        if self.world.rank != 0:
            return []
        named = zip(examples, told.tolist(), strict=True)
        return samples([(one.text, self.names[one.label], self.names[answer]) for one, answer in named])
