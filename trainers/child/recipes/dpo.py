"""Direct preference optimisation, read from top to bottom: model, pairs, engine, what the reference thinks of them, then the
session's loop. The reference is the model as the run finds it; it is asked once, before the first step, and is not kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trainers.child.control import Control
from trainers.child.data import Plan, micro_batch_size, micro_batches
from trainers.child.engine import Engine, make_engine
from trainers.child.kernels import fuse
from trainers.child.loss import SummedLoss, sent
from trainers.child.memory import MemoryLimit
from trainers.child.model import load
from trainers.child.optimizer import Named, Saved
from trainers.child.packing import PACKED_TOKENS
from trainers.child.preference import Margins, Pair, Pairs, all_sides, encode_pairs, flat, margins
from trainers.child.rows import Rows, read_data
from trainers.child.session import DataFacts, Fields, MicroBatch, Place, Session, update
from trainers.child.token_cache import TokenCache, telling
from trainers.child.world import World
from trainers.config import TrainConfig


def run(config: TrainConfig, world: World, control: Control, memory: MemoryLimit) -> None:
    """Trains to the end and leaves the artifact. Raises TrainFailure and Stopped."""
    loaded = load(config, world.device)
    hyper = config.hyperparams
    rows, rows_held_out = read_data(config)
    cache = TokenCache.of(config, world.rank)

    def encoded(of: Rows) -> Pairs:
        sides = cache.encode(all_sides(of), loaded.tokenizer, telling(control, each=2))
        return encode_pairs(of, loaded.tokenizer, hyper, loaded.context, sides)

    data = encoded(rows)
    held_out = encoded(rows_held_out).pairs if rows_held_out else []
    plan = Plan(len(data.pairs), hyper)

    loss = SummedLoss(loaded.model)
    micro = micro_batch_size(hyper, world.size, 2 * data.max_seq_len)
    engine = WithReference(make_engine(loss, config, world, micro))
    short = data.max_seq_len <= PACKED_TOKENS  # a longer sequence would spend its time on what the mask throws away
    loaded = fuse(loaded, config, world, control)
    loss.find_shortcuts(packing=hyper.packing if short else False, max_seq_len=data.max_seq_len)
    config = replace(config, hyperparams=replace(hyper, packing=loss.packs))
    if short and hyper.packing is not False:  # the memory estimate counts on packed passes
        micro = min(micro, max(1, PACKED_TOKENS // data.max_seq_len))
    loss.train()
    torch.manual_seed(hyper.seed + world.rank)  # dropout differs from rank to rank

    policy = Policy(loss, loaded.tokenizer.pad_token_id, world, control)
    trainer = _Trainer(policy, engine, data.pairs, plan, MicroBatch(micro), hyper.beta)
    evaluate = (lambda: trainer.evaluate(held_out)) if held_out else None
    session = Session(Place(config, world, control, memory), loaded, engine, plan, evaluate)
    session.open()
    if not engine.reference:  # a checkpoint brings it along
        engine.reference["train"] = policy.ask(data.pairs, micro, "reference")
        engine.reference["validation"] = policy.ask(held_out, micro, "reference of the validation rows")
    session.run(trainer, _facts(data))


def _facts(data: Pairs) -> DataFacts:
    tokens = sum(pair.tokens for pair in data.pairs)
    return DataFacts(len(data.pairs), tokens, data.max_seq_len, data.truncated, data.dropped)


@dataclass(frozen=True)
class WithReference:
    """An engine whose state includes what the reference thinks: {"train", "validation"}, each [pairs, 2]."""

    engine: Engine
    reference: dict[str, torch.Tensor] = field(default_factory=dict)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.engine.backward(loss, last=last)

    def step(self, lr: float) -> torch.Tensor | float:
        return self.engine.step(lr)

    def state(self) -> Iterator[Named]:
        yield from self.engine.state()
        yield from ((f"reference/{rows}", asked) for rows, asked in self.reference.items())

    def load_state(self, saved: Saved) -> None:
        self.reference.update({rows: saved.read(f"reference/{rows}") for rows in ("train", "validation")})
        self.engine.load_state(saved)

    def tensors(self) -> Iterator[torch.Tensor]:
        return self.engine.tensors()


@dataclass(frozen=True)
class Policy:
    """The model as a judge of answers."""

    loss: SummedLoss
    pad: int
    world: World
    control: Control

    def log_probs(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """[pairs, 2]; in fp32 on the model's device."""
        piece = self.loss.piece(flat(pairs), self.pad)
        return -self.loss(piece, rows=2 * len(pairs)).view(len(pairs), 2)

    @torch.no_grad()
    def ask(self, pairs: Sequence[Pair], size: int, what: str) -> torch.Tensor:
        """[pairs, 2] on the host, the same on all ranks, without dropout. Raises Stopped."""
        self.loss.eval()
        found = torch.zeros(len(pairs), 2, dtype=torch.float64)
        for batch in self.batches(len(pairs), size):
            found[batch] = self.log_probs([pairs[i] for i in batch]).double().cpu()
            self.control.emit("progress", what=what, done=batch[-1] + 1 if batch else 0, total=len(pairs))
        self.loss.train()
        return torch.tensor(self.world.sum(*found.flatten().tolist())).view(-1, 2)

    def batches(self, rows: int, size: int) -> Iterator[list[int]]:
        """This rank's share of all rows."""
        for batch in micro_batches(range(rows), self.world.rank, self.world.size, size):
            self.control.between()
            yield batch


@dataclass(frozen=True)
class _Trainer:
    """One optimizer step over a global batch, and the same measures on other pairs."""

    policy: Policy
    engine: WithReference
    pairs: Sequence[Pair]
    plan: Plan
    micro: MicroBatch
    beta: float

    def step(self, step: int) -> Fields:
        """The loss is the mean over the pairs of the global batch."""
        batch, world = self.plan.batch(step), self.policy.world
        pieces = micro_batches(batch, world.rank, world.size, self.micro.size)
        sums = self._no_measures()
        for number, rows in enumerate(pieces, 1):
            found = self._margins([self.pairs[row] for row in rows], self.engine.reference["train"][rows])
            self.engine.backward(found.loss() / len(batch), last=number == len(pieces))
            sums += found.measures()
            self.policy.control.progress(f"step {step}, forward passes", number, len(pieces))
        mean, right, margin = world.total(sums) / len(batch)
        lr = self.plan.lr(step)
        norm = update(self.engine, lr)
        measured = {"reward_accuracy": right, "reward_margin": margin}
        tokens = sum(self.pairs[row].tokens for row in batch)
        return {"loss": mean, "lr": lr, "grad_norm": norm, "tokens": tokens, **measured}

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Raises Stopped."""
        self.policy.loss.eval()
        sums = self._no_measures()
        for batch in self.policy.batches(len(pairs), self.micro.size):
            sums += self._margins([pairs[i] for i in batch], self.engine.reference["validation"][batch]).measures()
            self.policy.control.progress("evaluation, pairs", batch[-1] + 1 if batch else len(pairs), len(pairs))
        self.policy.loss.train()
        loss, right, margin = (self.policy.world.total(sums) / len(pairs)).tolist()
        return {"loss": loss, "reward_accuracy": right, "reward_margin": margin, "rows": len(pairs)}

    def _margins(self, pairs: Sequence[Pair], reference: torch.Tensor) -> Margins:
        log_probs = self.policy.log_probs(pairs)
        return margins(log_probs, sent(reference.to(log_probs.dtype), log_probs.device), self.beta)

    def _no_measures(self) -> torch.Tensor:
        return torch.zeros(3, dtype=torch.float64, device=self.policy.world.device)
