"""What all recipes share once model, data and engine are there: resume, the loop over steps, evaluations, checkpoints, the end."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from trainers.child.artifact import Run, load_saved, write_artifact
from trainers.child.checkpoint import Position, Store, Written, identity_of
from trainers.child.control import Actions, Control
from trainers.child.data import Plan
from trainers.child.deepspeed_config import zero_stage
from trainers.child.engine import Engine
from trainers.child.failure import TrainFailure, describe, is_memory
from trainers.child.memory import MemoryLimit
from trainers.child.model import Loaded
from trainers.child.outputs.forms import require_forms
from trainers.child.park import Parking, tensors_of
from trainers.child.parted import whole_weights
from trainers.child.world import World
from trainers.config import TrainConfig

Fields = dict[str, Any]


class Trainer(Protocol):
    @property
    def micro(self) -> MicroBatch: ...

    def step(self, step: int) -> Fields:
        """{loss, lr, grad_norm, tokens} and what else it measured: numbers, or tensors that the device is still at. Raises
        TrainFailure."""
        ...


@dataclass
class MicroBatch:
    """At most so many rows in one forward pass; fewer once the memory was too small for them."""

    size: int

    def halve(self) -> bool:
        """False: it is one row already."""
        halved, self.size = self.size > 1, max(1, self.size // 2)
        return halved


BEST_LOSS, BEST_STEP, NOT_BETTER = "best_validation_loss", "best_step", "evaluations_not_better"
"""In the metrics of a position: a run that resumes goes on counting."""
OF_STEP = "weights_of_step"
"""In the metrics of an artifact that has not the last weights but the best ones."""

_NOT_MEASURES = ("rows", "samples")


@dataclass(frozen=True)
class Place:
    """Where a run runs."""

    config: TrainConfig
    world: World
    control: Control
    memory: MemoryLimit


@dataclass(frozen=True)
class DataFacts:
    """Of the rows as they are trained on: how many, their tokens, the limit, and how many were cut or left out."""

    rows: int
    tokens: int
    max_seq_len: int
    truncated: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Step:
    """One that was computed, or is being computed by the device; `began` by this process's clock."""

    number: int
    measured: Fields
    began: float


@dataclass
class Session:
    """`evaluate`: the fields of an `evaluated` message, but for step and when; None: there is nothing to evaluate on."""

    place: Place
    loaded: Loaded
    engine: Engine
    plan: Plan
    evaluate: Callable[[], Fields] | None
    position: Position = field(default_factory=Position)
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint"))
    _untold: Step | None = None
    _told_at: float = 0.0
    _unstored: set[int] = field(default_factory=set)
    _writing: Future[None] | None = None
    """The checkpoint that is on its way to the disk while the training goes on."""

    def open(self) -> None:
        """Stands where the checkpoint says, or at the start. Raises TrainFailure."""
        config = self.place.config
        require_forms(config)
        identity = identity_of(config, self.loaded.precision)
        control, loaded = self.place.control, self.loaded
        self.store = Store(
            config, self.place.world, identity, loaded.precision, loaded.kernels, progress=control.progress
        )
        self.position = self.position.continued_by(self.place.world.size)
        if config.resume_from:
            self.position = self.store.read(Path(config.resume_from), self.engine)
        self._began = self.position.step
        parking = Parking(self._tensors, self.place.world.device)
        actions = Actions(self._save, self._prune, self._drop, self._settle, parking.leave, parking.come_back)
        control.attach(actions, self.position.step)
        self.place.memory.check()

    def run(self, trainer: Trainer, facts: DataFacts) -> None:
        """From where it stands to the artifact. Raises TrainFailure and Stopped."""
        try:
            self._run(trainer, facts)
        finally:  # a run that fails keeps the checkpoint that it was writing
            with contextlib.suppress(OSError, RuntimeError, SafetensorError):
                self._settle()

    def _run(self, trainer: Trainer, facts: DataFacts) -> None:
        control = self.place.control
        self._report_ready(facts)
        if self.position.step == 0:
            self._evaluate("before")
        else:
            self._evaluate_during()
        control.between()
        while self.position.step < self.plan.steps and not self._stops_early():
            self._advance(trainer)
            if self.position.step == self.plan.steps:
                control.save()
            else:
                self._evaluate_during()
            control.between()
        control.save()  # one that stopped early
        if self._keeps_best():
            self._return_to_best()
        self._evaluate("after")
        self._finish()

    def _advance(self, trainer: Trainer) -> None:
        began, step = time.monotonic(), self.position.step + 1
        done = self._train(trainer, step)
        self.place.memory.check()
        self._tell()
        self._untold = Step(step, done, began)
        if not runs_ahead(self.place.world):
            self._tell()
        self.position = replace(self.position, step=step)
        self.place.control.step = step
        if self._writing is not None and self._writing.done():
            self._settle()

    def _tell(self) -> None:
        """Of the last step. An accelerator has the next one to do by then: nobody waits for it, and it waits for nobody."""
        if self._untold is None:
            return
        step, self._untold = self._untold, None
        done = {key: float(value) if torch.is_tensor(value) else value for key, value in step.measured.items()}
        require_finite("loss", done["loss"], step.number)
        require_finite("gradient", done["grad_norm"], step.number)
        self.position = replace(self.position, metrics={**self.position.metrics, "train_loss": done["loss"]})
        self.store.journal.add("step", step.number, done)
        began, self._told_at = max(step.began, self._told_at), time.monotonic()
        seconds = self._told_at - began
        self.place.control.emit("step", step=step.number, epoch=self.plan.epoch(step.number), **done, seconds=seconds)

    def _train(self, trainer: Trainer, step: int) -> Fields:
        """Again with half the micro-batch where the memory was too small. Not with several ranks, which could not agree on that,
        nor with DeepSpeed, which keeps gradients of its own: the next attempt does it there."""
        while True:
            try:
                return trainer.step(step)
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error) or not self._may_halve or not trainer.micro.halve():
                    raise
            for parameter in self.loaded.model.parameters():
                parameter.grad = None
            if self.place.world.device != "cpu":
                torch.cuda.empty_cache()
            rows = f"at most {trainer.micro.size} row(s) in a forward pass"
            warn(self.place.control, f"Step {step} ran out of memory; once more with {rows}.")

    @property
    def _may_halve(self) -> bool:
        return self.place.world.size == 1 and zero_stage(self.place.config) == 0

    def _save(self) -> None:
        """One at a time: the disk sets the pace, and the system keeps one snapshot."""
        self._tell()
        self._settle()
        finish = self.store.write(self.position, self.loaded.model, self.engine)
        if finish is not None:
            self._writing = self._disk.submit(self._finish_checkpoint, finish, self.position.metrics)

    def _finish_checkpoint(self, finish: Callable[[], Written], metrics: Fields) -> None:
        """In a thread of its own."""
        written = finish()
        self.place.control.emit(
            "checkpoint",
            step=written.step,
            path=str(written.path),
            bytes=written.bytes,
            sha256=written.sha256,
            metrics=metrics,
        )

    def _settle(self) -> None:
        """Waits for the disk. Raises what the writing raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from tensors_of(self.loaded.model)
        yield from self.engine.tensors()

    def _prune(self, durable: int) -> None:
        self.store.prune(durable, self._best_step)

    def _drop(self, step: int) -> None:
        """Nobody stores it: it is of use only as the best one, for as long as it is that."""
        self._unstored.add(step)
        for one in self._unstored - {self._best_step}:
            self.store.drop(one)
            self._unstored.discard(one)

    # ── the best weights ────────────────────────────────────────────────────────────────────────────────────────────

    def _keeps_best(self) -> bool:
        """As `load_best_model_at_end` of transformers, which its early stopping asks for."""
        hyper = self.place.config.hyperparams
        wanted = hyper.load_best_model_at_end
        return self.evaluate is not None and (wanted if wanted is not None else bool(hyper.early_stopping_patience))

    @property
    def _best_step(self) -> int | None:
        return self.position.metrics.get(BEST_STEP) if self._keeps_best() else None

    def _return_to_best(self) -> None:
        """The last weights compete too."""
        if self.position.evaluated_step != self.position.step or BEST_STEP not in self.position.metrics:
            self._evaluate("during")
        best = self.position.metrics[BEST_STEP]
        if best == self.position.step:
            return
        folder, world = self.store.weights_of(best, self._began), self.place.world
        if not world.from_first(folder is not None):
            warn(self.place.control, f"The checkpoint of step {best} was not kept: the model has the last weights.")
            return
        load_saved(self.loaded.model, folder, world)
        self.position = replace(self.position, metrics={**self.position.metrics, OF_STEP: best})
        message = f"The model has the weights of step {best}, which had the lowest validation loss."
        self.place.control.emit("log", level="info", message=message)

    # ── evaluation ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _evaluate_during(self) -> None:
        every, step = self._evaluation_steps(), self.position.step
        if every and step % every == 0 and self.position.evaluated_step != step:
            self._evaluate("during")
            if self.position.metrics.get(BEST_STEP) == step:
                self.place.control.save(wait=False)  # the best so far must not wait for the clock

    def _evaluation_steps(self) -> int | None:
        hyper = self.place.config.hyperparams
        once_an_epoch = self.plan.steps_per_epoch if hyper.early_stopping_patience or self._keeps_best() else None
        return hyper.eval_steps or once_an_epoch

    def _evaluate(self, when: str) -> None:
        self._tell()
        if self.evaluate is None:
            return
        with self.place.control.during("evaluating"):
            fields = self.evaluate()
        measured = {f"validation_{key}": value for key, value in fields.items() if key not in _NOT_MEASURES}
        metrics = {**self.position.metrics, **measured}
        if when == "during":
            metrics |= _compared(metrics, self.position.step)
        self.position = replace(self.position, evaluated_step=self.position.step, metrics=metrics)
        self.store.journal.add("evaluated", self.position.step, fields)
        self.place.control.emit("evaluated", step=self.position.step, when=when, **fields)

    def _stops_early(self) -> bool:
        patience = self.place.config.hyperparams.early_stopping_patience
        return patience is not None and self.position.metrics.get(NOT_BETTER, 0) >= patience

    # ── what is told ────────────────────────────────────────────────────────────────────────────────────────────────

    def _report_ready(self, facts: DataFacts) -> None:
        control = self.place.control
        if self.loaded.template_added:
            warn(control, "The base model has no chat template; ChatML is used and stored.")
        if facts.truncated:
            left_out = f"{facts.dropped} of them are left out"
            warn(control, f"{facts.truncated} rows are longer than {facts.max_seq_len} tokens; {left_out}.")
        control.emit(
            "ready",
            steps=self.plan.steps,
            epochs=self.plan.epoch(self.plan.steps),
            start_step=self.position.step,
            trainable_parameters=self.loaded.count(trainable=True),
            parameters=self.loaded.count(),
            tokens_per_epoch=facts.tokens,
            rows=facts.rows,
            threads=torch.get_num_threads(),
            precision=self.loaded.precision,
            kernels=self.loaded.kernels,
            worlds=self.position.worlds,
        )
        control.state = "training"

    def _finish(self) -> None:
        control, world = self.place.control, self.place.world
        if self._stops_early():
            best = f"the lowest validation loss was that of step {self.position.metrics[BEST_STEP]}"
            control.emit("log", level="info", message=f"Stopped early after step {self.position.step}: {best}.")
        control.state = "finishing"
        control.close()
        weights = whole_weights(self.loaded.model, world)
        if world.rank != 0:
            return  # what follows can take longer than a rank may wait for another
        run = Run(self.position.metrics, self.store.journal)
        made = write_artifact(self.loaded, self.place.config, run, weights)
        for message in made.left_out:
            warn(control, message)
        control.state = "finished"
        done = {"artifact": str(made.folder), "sha256": made.sha256, "metrics": self.position.metrics}
        control.emit("finished", step=self.position.step, **done)


def _compared(metrics: Fields, step: int) -> Fields:
    if metrics["validation_loss"] < metrics.get(BEST_LOSS, math.inf):
        return {BEST_LOSS: metrics["validation_loss"], BEST_STEP: step, NOT_BETTER: 0}
    return {NOT_BETTER: metrics.get(NOT_BETTER, 0) + 1}


def warn(control: Control, message: str) -> None:
    control.emit("log", level="warning", message=message)


def runs_ahead(world: World) -> bool:
    """Whether the device computes while this process goes on."""
    return world.device != "cpu"


def update(engine: Engine, lr: float) -> torch.Tensor | float:
    """The gradient's norm. Raises TrainFailure when memory runs out: half an update cannot be taken back."""
    try:
        return engine.step(lr)
    except (RuntimeError, MemoryError) as error:
        raise describe(error) from error


def require_finite(what: str, value: float, step: int) -> None:
    """Raises TrainFailure."""
    if not math.isfinite(value):
        raise TrainFailure(
            "loss_not_finite",
            f"The {what} of step {step} is {value}. No checkpoint holds it.",
            hint="Lower lr, raise warmup_ratio, or look for rows with broken text; resume from the last checkpoint.",
        )
