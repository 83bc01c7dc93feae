"""Supervised fine-tuning, read from top to bottom: model, data, engine, resume, evaluate, loop, save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainers.child.artifact import write_artifact
from trainers.child.checkpoint import Position, Store, identity_of
from trainers.child.control import Actions, Control
from trainers.child.data import Encoded, Example, Plan, encode, micro_batch_size, micro_batches, read_rows
from trainers.child.engine import Engine, make_engine
from trainers.child.evaluate import Evaluator, Validation, make_validation
from trainers.child.failure import TrainFailure
from trainers.child.loss import SummedLoss, collate
from trainers.child.memory import MemoryLimit
from trainers.child.model import Loaded, load
from trainers.child.world import World
from trainers.config import TrainConfig


def run(config: TrainConfig, world: World, control: Control, memory: MemoryLimit) -> None:
    """Trains to the end and leaves the artifact. Raises TrainFailure and Stopped."""
    loaded = load(config, world.device)
    data = encode(read_rows(config.train_file), loaded.tokenizer, config.hyperparams, loaded.context)
    validation = make_validation(read_rows(config.validation_file), loaded, config) if config.validation_file else None
    plan = Plan(len(data.examples), config.hyperparams)
    micro = micro_batch_size(config.hyperparams, world.size, data.max_seq_len)

    loss = SummedLoss(loaded.model)
    loss.find_split()
    loss.train()
    engine = make_engine(loss, config, world, micro)
    torch.manual_seed(config.hyperparams.seed + world.rank)  # dropout differs from rank to rank

    store = Store(config, world, identity_of(config, loaded.precision))
    position = store.read(Path(config.resume_from), engine) if config.resume_from else Position()
    trainer = _Trainer(loss, engine, data.examples, plan, world, micro, loaded.tokenizer.pad_token_id)
    session = _Session(
        config, control, store, loaded, engine, Evaluator(loss, loaded, config, world, control), validation
    )
    session.position = position
    control.attach(Actions(session.save, store.prune), position.step)
    memory.check()
    _report_ready(control, loaded, data, plan, position.step)
    if position.step == 0:
        session.evaluate("before")
    else:
        session.evaluate_during(position.step)
    control.between()

    for step in range(position.step + 1, plan.steps + 1):
        began = time.monotonic()
        done = trainer.step(step)
        memory.check()
        session.advance(step, done["loss"])
        control.emit("step", step=step, epoch=plan.epoch(step), **done, seconds=time.monotonic() - began)
        if step == plan.steps:
            control.save()
        else:
            session.evaluate_during(step)
        control.between()

    session.evaluate("after")
    control.state = "finishing"
    control.close()
    if world.rank == 0:
        folder, hashes = write_artifact(loaded, config, session.position.metrics)
        control.state = "finished"
        control.emit("finished", step=plan.steps, artifact=str(folder), sha256=hashes, metrics=session.position.metrics)
    world.barrier()


def _report_ready(control: Control, loaded: Loaded, data: Encoded, plan: Plan, start_step: int) -> None:
    if loaded.template_added:
        control.emit("log", level="warning", message="The base model has no chat template; ChatML is used and stored.")
    if data.truncated:
        control.emit(
            "log",
            level="warning",
            message=f"{data.truncated} rows are longer than {data.max_seq_len} tokens; {data.dropped} of them are left out.",
        )
    control.emit(
        "ready",
        steps=plan.steps,
        epochs=plan.epoch(plan.steps),
        start_step=start_step,
        trainable_parameters=loaded.count(trainable=True),
        parameters=loaded.count(),
        tokens_per_epoch=sum(len(example.ids) for example in data.examples),
        rows=len(data.examples),
        threads=torch.get_num_threads(),
        precision=loaded.precision,
    )
    control.state = "training"


@dataclass(frozen=True)
class _Trainer:
    """One optimizer step over a global batch."""

    loss: SummedLoss
    engine: Engine
    examples: Sequence[Example]
    plan: Plan
    world: World
    micro: int
    pad: int

    def step(self, step: int) -> dict[str, Any]:
        """{loss, lr, grad_norm, tokens}. The loss is a mean over all loss tokens of the global batch, so that neither the
        micro-batch nor the number of ranks changes it."""
        batch, lr = self.plan.batch(step), self.plan.lr(step)
        loss_tokens = sum(self.examples[row].loss_tokens for row in batch)
        pieces = micro_batches(batch, self.world.rank, self.world.size, self.micro)
        total = 0.0
        for number, rows in enumerate(pieces, 1):
            ids, labels = collate([self.examples[row] for row in rows], self.pad)
            part = self.loss(ids.to(self.world.device), labels.to(self.world.device)) / loss_tokens
            self.engine.backward(part, last=number == len(pieces))
            total += float(part.detach())
        mean = self.world.sum(total)[0]
        _require_finite("loss", mean, step)
        norm = self.engine.step(lr)
        _require_finite("gradient", norm, step)
        tokens = sum(len(self.examples[row].ids) for row in batch)
        return {"loss": mean, "lr": lr, "grad_norm": norm, "tokens": tokens}


@dataclass
class _Session:
    """What a checkpoint and an evaluation need to know of the run."""

    config: TrainConfig
    control: Control
    store: Store
    loaded: Loaded
    engine: Engine
    evaluator: Evaluator
    validation: Validation | None

    def __post_init__(self) -> None:
        self.position = Position()

    def advance(self, step: int, loss: float) -> None:
        self.position = replace(self.position, step=step, metrics={**self.position.metrics, "train_loss": loss})
        self.control.step = step

    def save(self) -> None:
        written = self.store.write(self.position, self.loaded.model, self.engine)
        if written is not None:
            self.control.emit(
                "checkpoint",
                step=written.step,
                path=str(written.path),
                bytes=written.bytes,
                sha256=written.sha256,
                metrics=self.position.metrics,
            )

    def evaluate_during(self, step: int) -> None:
        every = self.config.hyperparams.eval_steps
        if every and step % every == 0 and self.position.evaluated_step != step:
            self.evaluate("during")

    def evaluate(self, when: str) -> None:
        if self.validation is None:
            return
        with self.control.during("evaluating"):
            fields = self.evaluator.run(self.validation)
        measured = {f"validation_{key}": fields[key] for key in ("loss", "exact_match") if key in fields}
        metrics = {**self.position.metrics, **measured}
        self.position = replace(self.position, evaluated_step=self.position.step, metrics=metrics)
        self.control.emit("evaluated", step=self.position.step, when=when, **fields)


def _require_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainFailure(
            "loss_not_finite",
            f"The {what} of step {step} is {value}. No checkpoint holds it.",
            hint="Lower lr, raise warmup_ratio, or look for rows with broken text; resume from the last checkpoint.",
        )
