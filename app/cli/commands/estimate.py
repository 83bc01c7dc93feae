"""`estimate`: how much memory a training needs, from a model's config.json alone. Needs no service."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from app.cli.command import command
from app.cli.output import pairs, table
from app.cli.session import Session
from cluster.core.kinds import CPU, memory_gb, resolve_kind
from cluster.errors import InvalidRequest
from trainers.run.footprint import DEFAULT_SEQ_LEN, PARTS, Training
from trainers.run.memory import Estimate, estimate, most_rows

CHOICES = {
    "training_type": ("lora", "qlora", "full"),
    "method": ("sft", "dpo"),
    "task": ("causal_lm", "sequence_classification"),
    "precision": ("bf16", "fp32"),
    "offload": ("none", "optimizer", "parameters"),
}


def _one_of(name: str, more: str = "") -> Any:
    return typer.Option(help=" or ".join([", ".join(CHOICES[name][:-1]), CHOICES[name][-1]]) + f".{more}")


@dataclass(frozen=True)
class Options:
    training_type: Annotated[str, _one_of("training_type")] = "lora"
    method: Annotated[str, _one_of("method")] = "sft"
    task: Annotated[str, _one_of("task")] = "causal_lm"
    precision: Annotated[str, _one_of("precision")] = "bf16"
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = DEFAULT_SEQ_LEN
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of one step, over all GPUs.")] = 8
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Rows in one forward pass. Default: what --gpu-type has room for, else 1.")
    ] = None
    packing: Annotated[bool, typer.Option(help="Short rows share a forward pass.")] = True
    lora_r: Annotated[int, typer.Option(min=1)] = 16
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed, with more than one GPU.")] = 2
    offload: Annotated[str, _one_of("offload", " To the host's memory.")] = "none"
    checkpointing: Annotated[bool, typer.Option(help="Layers are computed again for the backward pass.")] = False
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: 1, 2, 4 and 8.")] = None
    gpu_type: Annotated[str | None, typer.Option(help="Does it fit on these? cpu is one.")] = None


def register(app: typer.Typer) -> None:
    command(app, "estimate")(estimate_)


def estimate_(
    session: Session,
    model: Annotated[Path, typer.Argument(exists=True, help="A model folder, or its config.json.")],
    options: Options,
) -> None:
    """Memory per GPU that fine-tuning needs. Works offline."""
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise InvalidRequest(f"{flag} is one of {', '.join(allowed)}", param=flag)
    config = read_config(model)
    kind = resolve_kind(options.gpu_type) if options.gpu_type else None
    available = memory_gb(kind) if kind else None
    counts = [options.gpus] if options.gpus else (1, 2, 4, 8)
    found = [_estimate(config, _training(options, slots, kind == CPU), options, available) for slots in counts]
    data = {
        "model_type": config.get("model_type"),
        "parameters": found[0].parameters,
        "trainable_parameters": found[0].trainable_parameters,
        "rule_memory_gb": found[0].rule_gb,
        "per_gpu": [{**one.as_dict(), **({"fits": one.total_gb <= available} if available else {})} for one in found],
    }
    session.out.show(data, lambda: _drawn(data, found, available))


def read_config(model: Path) -> dict[str, Any]:
    file = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{file} cannot be read as a model's configuration: {error}",
            param="MODEL",
            hint="name a folder with config.json",
        ) from error
    if not isinstance(config, dict):
        raise InvalidRequest(f"{file} holds no JSON object", param="MODEL")
    return config


def _training(options: Options, slots: int, on_cpu: bool) -> Training:
    here = ("gpus", "gpu_type", "micro_batch")
    shared = {key: value for key, value in vars(options).items() if key not in here}
    return Training(**shared, slots=slots, micro_batch=options.micro_batch or 1, on_cpu=on_cpu, bounded=False)


def _estimate(config: dict[str, Any], training: Training, options: Options, available: float | None) -> Estimate:
    if options.micro_batch is None and available:
        return most_rows(config, training, available)
    return estimate(config, training)


def _drawn(data: dict[str, Any], found: list[Estimate], available: float | None) -> Any:
    parts = [part for part in PARTS if any(one.parts.get(part) for one in found)]
    rows = [
        (
            one.slots,
            one.total_gb,
            one.micro_batch,
            *(round(one.parts.get(part, 0) / 2**30, 2) for part in parts),
            *_fits(one, available),
        )
        for one in found
    ]
    columns = ("gpus", "gib per gpu", "rows a pass", *parts, *(("fits",) if available else ()))
    head = pairs(
        [
            ("parameters", f"{data['parameters'] / 1e6:,.1f} M, trained {data['trainable_parameters'] / 1e6:,.1f} M"),
            ("2.5× rule", f"{data['rule_memory_gb']} GB"),
        ]
    )
    return Group(head, table(columns, rows))


def _fits(one: Estimate, available: float | None) -> tuple[str, ...]:
    return () if available is None else ("yes" if one.total_gb <= available else "no",)
