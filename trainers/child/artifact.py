"""What a run leaves: a LoRA adapter as peft writes it, or a Hugging Face folder, with tokenizer, chat template and lineage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from trainers.child.folders import aside, publish
from trainers.child.model import Loaded
from trainers.child.outputs.card import Card, model_card
from trainers.child.outputs.forms import add_curves, add_forms
from trainers.child.outputs.history import Journal
from trainers.child.parted import put_together
from trainers.child.shards import Shards
from trainers.child.world import World
from trainers.config import TrainConfig

Weights = Optional[dict[str, Any]]
"""As `trainers.child.parted.whole_weights` has them."""


@dataclass(frozen=True)
class Run:
    """What is told of a run beside its model."""

    metrics: dict[str, Any]
    journal: Journal


@dataclass(frozen=True)
class Artifact:
    """`sha256`: by file. `left_out`: why a form that was asked for is not there, a sentence each."""

    folder: Path
    sha256: dict[str, str]
    left_out: list[str]


def save_model(model: Any, folder: Path, weights: Weights = None) -> None:
    """Weights and configuration; a checkpoint and an artifact hold them alike. `weights`: where the model's own are parted."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        if model.peft_config["default"].task_type == "SEQ_CLS":
            model.config.save_pretrained(folder)  # the names of the classes
    else:
        model.save_pretrained(folder, state_dict=weights)


def load_saved(model: Any, folder: Path | None, world: World) -> None:
    """Puts the weights that `save_model` wrote into the model as it stands. Called by all ranks together; the first one needs the
    `folder`, which other nodes do not have."""
    with put_together(model) as parted:
        if world.rank == 0 and folder is not None:
            _read_into(model, folder)
        if not parted:
            world.share(parameter.data for parameter in model.parameters() if parameter.requires_grad)


def _read_into(model: Any, folder: Path) -> None:
    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    state = model.state_dict()
    with torch.no_grad(), Shards(folder) as shards:
        for name in shards.names:
            state[name].copy_(shards.read(name))


def write_artifact(loaded: Loaded, config: TrainConfig, run: Run, weights: Weights = None) -> Artifact:
    """`weights`: where the model's own are parted. Raises OSError, and what the libraries raise when the disk is full."""
    folder = Path(config.output_dir) / "artifact"
    temporary = aside(folder)
    base = str(config.metadata.get("base_model") or Path(config.base_model).name)
    if hasattr(loaded.model, "peft_config"):
        loaded.model.peft_config["default"].base_model_name_or_path = base
    save_model(loaded.model, temporary, weights)
    loaded.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_readme(config, base, loaded, run.metrics), encoding="utf-8")
    left_out = add_forms(temporary, config)
    run.journal.write(temporary)
    left_out += add_curves(temporary, config.outputs, run.journal)
    return Artifact(folder, publish(temporary, folder), left_out)


def _readme(config: TrainConfig, base: str, loaded: Loaded, metrics: dict[str, Any]) -> str:
    added = (
        "The base model had no chat template; ChatML was used and is stored here." if loaded.template_added else None
    )
    return model_card(
        Card(
            base=base,
            method=config.method,
            training_type=config.training_type,
            precision=loaded.precision,
            task=config.task,
            world_size=config.world_size,
            hyperparams=config.to_dict()["hyperparams"],
            metrics=metrics,
            metadata=config.metadata,
            note=added,
        )
    )
