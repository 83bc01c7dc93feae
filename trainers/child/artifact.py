"""What a run leaves: a LoRA adapter as peft writes it, or a Hugging Face folder, with tokenizer, chat template and lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from trainers.child.folders import aside, publish
from trainers.child.model import Loaded
from trainers.child.outputs.card import Card, model_card
from trainers.config import TrainConfig

Weights = Optional[dict[str, Any]]
"""As `trainers.child.zero.whole_weights` has them."""


def save_model(model: Any, folder: Path, weights: Weights = None) -> None:
    """Weights and configuration; a checkpoint and an artifact hold them alike. `weights`: where the model's own are parted."""
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
        if model.peft_config["default"].task_type == "SEQ_CLS":
            model.config.save_pretrained(folder)  # the names of the classes
    else:
        model.save_pretrained(folder, state_dict=weights)


def write_artifact(
    loaded: Loaded, config: TrainConfig, metrics: dict[str, Any], weights: Weights = None
) -> tuple[Path, dict[str, str]]:
    """(folder, {file: sha256})."""
    folder = Path(config.output_dir) / "artifact"
    temporary = aside(folder)
    base = str(config.metadata.get("base_model") or Path(config.base_model).name)
    if hasattr(loaded.model, "peft_config"):
        loaded.model.peft_config["default"].base_model_name_or_path = base
    save_model(loaded.model, temporary, weights)
    loaded.tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(_readme(config, base, loaded, metrics), encoding="utf-8")
    return folder, publish(temporary, folder)


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
