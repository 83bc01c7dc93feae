"""Supervised fine-tuning, read from top to bottom: model, data, engine, then the session's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trainers.child.control import Control
from trainers.child.data import Encoded, Example, Plan, encode, micro_batch_size, micro_batches
from trainers.child.engine import Engine, make_engine
from trainers.child.evaluate import Evaluator, make_validation
from trainers.child.kernels import fuse
from trainers.child.loss import SummedLoss
from trainers.child.memory import MemoryLimit
from trainers.child.model import load
from trainers.child.packing import PACKED_TOKENS, packs
from trainers.child.rows import read_data
from trainers.child.session import DataFacts, Fields, MicroBatch, Place, Session, update, warn
from trainers.child.token_cache import TokenCache, telling
from trainers.child.world import World
from trainers.config import TrainConfig


def run(config: TrainConfig, world: World, control: Control, memory: MemoryLimit) -> None:
    """Trains to the end and leaves the artifact. Raises TrainFailure and Stopped."""
    loaded = load(config, world.device)
    rows, held_out = read_data(config)
    cache = TokenCache.of(config, world.rank)
    examples = cache.encode(rows, loaded.tokenizer, telling(control))
    data = encode(rows, loaded.tokenizer, config.hyperparams, loaded.context, examples)
    validation = make_validation(held_out, loaded, config, cache, telling(control)) if held_out else None
    plan = Plan(len(data.examples), config.hyperparams)
    micro = micro_batch_size(config.hyperparams, world.size, data.max_seq_len)

    loss = SummedLoss(loaded.model)
    engine = make_engine(loss, config, world, micro)
    loaded = fuse(loaded, config, world, control)
    loss.find_shortcuts(packing=config.hyperparams.packing, max_seq_len=data.max_seq_len)
    if config.hyperparams.packing and not loss.packs:
        warn(control, "Rows are not packed: this architecture does not give the same numbers that way.")
    if config.hyperparams.packing is not False and not loss.packs:  # the memory estimate counts on packed passes
        micro = min(micro, max(1, PACKED_TOKENS // data.max_seq_len))
    config = replace(config, hyperparams=replace(config.hyperparams, packing=loss.packs))
    loss.train()
    torch.manual_seed(config.hyperparams.seed + world.rank)  # dropout differs from rank to rank

    evaluator = Evaluator(loss, loaded, config, world, control)
    evaluate = (lambda: evaluator.run(validation)) if validation is not None else None
    session = Session(Place(config, world, control, memory), loaded, engine, plan, evaluate)
    session.open()
    most = MicroBatch(config.hyperparams.micro_batch_size or config.hyperparams.batch_size if loss.packs else micro)
    trainer = _Trainer(loss, engine, data.examples, plan, world, control, most, loaded.tokenizer.pad_token_id)
    session.run(trainer, _facts(data))


def _facts(data: Encoded) -> DataFacts:
    tokens = sum(len(example.ids) for example in data.examples)
    return DataFacts(len(data.examples), tokens, data.max_seq_len, data.truncated, data.dropped)


@dataclass(frozen=True)
class _Trainer:
    """One optimizer step over a global batch."""

    loss: SummedLoss
    engine: Engine
    examples: Sequence[Example]
    plan: Plan
    world: World
    control: Control
    micro: MicroBatch
    pad: int

    def step(self, step: int) -> Fields:
        """{loss, lr, grad_norm, tokens}. The loss is a mean over all loss tokens of the global batch, so that neither the
        micro-batch nor the number of ranks changes it."""
        batch, lr = self.plan.batch(step), self.plan.lr(step)
        loss_tokens = sum(self.examples[row].loss_tokens for row in batch)
        total = torch.zeros((), device=self.world.device)
        pieces = self._pieces(batch)
        for number, rows in enumerate(pieces, 1):
            piece = self.loss.piece([self.examples[row] for row in rows], self.pad)
            part = self.loss(piece) / loss_tokens
            self.engine.backward(part, last=number == len(pieces))
            total += part.detach()
            self.control.progress(f"step {step}, forward passes", number, len(pieces))
        mean = self.world.total(total)
        norm = update(self.engine, lr)
        tokens = sum(len(self.examples[row].ids) for row in batch)
        return {"loss": mean, "lr": lr, "grad_norm": norm, "tokens": tokens}

    def _pieces(self, batch: Sequence[int]) -> list[list[int]]:
        """This rank's rows, by forward pass."""
        if not self.loss.packs:
            return micro_batches(batch, self.world.rank, self.world.size, self.micro.size)
        lengths = {row: len(self.examples[row].ids) for row in batch}
        return packs(batch, lengths, self.world.size, self.micro.size)[self.world.rank]
