"""The model card of an artifact: what it is, how it was made and from what, how good it is, how to load it. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Dict, Optional

LINEAGE = {
    "job_id": "job",
    "base_model_sha256": "base model, SHA-256",
    "adapter_prefix": "continues",
    "dataset_sha256": "dataset, SHA-256",
    "validation_sha256": "validation rows, SHA-256",
    "environment": "environment",
    "code_version": "Heliostat",
}
"""Of what `trainers.run.preparing.lineage` says, that which has a line of its own."""
LOADING = {
    "lora": """from peft import PeftModel
from transformers import AutoModelFor{kind}, AutoTokenizer

base = AutoModelFor{kind}.from_pretrained({base})
model = PeftModel.from_pretrained(base, FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
    "full": """from transformers import AutoModelFor{kind}, AutoTokenizer

model = AutoModelFor{kind}.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)""",
}
KINDS = {"causal_lm": "CausalLM", "sequence_classification": "SequenceClassification"}


@dataclass(frozen=True)
class Card:
    base: str
    method: str
    training_type: str
    precision: str
    task: str = "causal_lm"
    world_size: int = 1
    hyperparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    note: Optional[str] = None
    """A sentence that a reader must not miss."""

    @property
    def adapts(self) -> bool:
        return self.training_type != "full"


def model_card(card: Card) -> str:
    """Markdown with a front matter as model hubs read it."""
    what = "LoRA adapter" if card.adapts else "model"
    parts = [
        _front(card),
        f"# {what} tuned from {card.base}",
        card.note or "",
        _section("Figures", _rows(card.metrics)),
        _section(
            "Lineage", _rows({LINEAGE[key]: value for key, value in card.metadata.items() if key in LINEAGE and value})
        ),
        f"## Load it\n\n```python\n{_loading(card)}\n```",
        "The base model's licence and limits hold for this one too.",
        f"## All of it\n\n```json\n{json.dumps(_everything(card), indent=2, default=str)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(card: Card) -> str:
    pipeline = "text-generation" if card.task == "causal_lm" else "text-classification"
    lines = [
        f"base_model: {json.dumps(card.base)}",
        f"library_name: {'peft' if card.adapts else 'transformers'}",
        f"pipeline_tag: {pipeline}",
        f"tags: [{card.method}, {card.training_type}]",
    ]
    return "\n".join(["---", *lines, "---"])


def _section(title: str, rows: str) -> str:
    return f"## {title}\n\n| | |\n|---|---|\n{rows}" if rows else ""


def _rows(values: Mapping[str, Any]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items())


def _cell(value: Any) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return shown.replace("|", "\\|").replace("\n", " ")


def _loading(card: Card) -> str:
    text = LOADING["lora" if card.adapts else "full"]
    return text.format(kind=KINDS[card.task], base=json.dumps(card.base))


def _everything(card: Card) -> Dict[str, Any]:
    return {
        "base_model": card.base,
        "method": card.method,
        "task": card.task,
        "training_type": card.training_type,
        "precision": card.precision,
        "world_size": card.world_size,
        "hyperparams": card.hyperparams,
        "metrics": card.metrics,
        **card.metadata,
    }
