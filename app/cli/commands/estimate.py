"""`estimate`: how much memory a training needs, from a model's config.json alone. Needs no service."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group

from app.cli.command import command
from app.cli.output import pairs, table
from app.cli.session import Session
from cluster.core.kinds import memory_gb, resolve_kind
from cluster.errors import InvalidRequest
from trainers.run.memory import DEFAULT_SEQ_LEN, Estimate, Training, estimate


@dataclass(frozen=True)
class Options:
    training_type: Annotated[str, typer.Option(help="lora or full.")] = "lora"
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16"
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of the longest row.")] = DEFAULT_SEQ_LEN
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 1
    lora_r: Annotated[int, typer.Option(min=1)] = 16
    zero_stage: Annotated[int, typer.Option(min=0, max=3, help="DeepSpeed, with more than one GPU.")] = 2
    gpus: Annotated[int | None, typer.Option(min=1, help="Default: 1, 2, 4 and 8.")] = None
    gpu_type: Annotated[str | None, typer.Option(help="Does it fit on these?")] = None


def register(app: typer.Typer) -> None:
    command(app, "estimate")(estimate_)


def estimate_(
    session: Session,
    model: Annotated[Path, typer.Argument(exists=True, help="A model folder, or its config.json.")],
    options: Options,
) -> None:
    """Memory per GPU that fine-tuning needs. Works offline."""
    if options.training_type not in ("lora", "full"):
        raise InvalidRequest("--training-type is lora or full", param="--training-type")
    config = read_config(model)
    available = memory_gb(resolve_kind(options.gpu_type)) if options.gpu_type else None
    found = [
        estimate(config, _training(options, slots)) for slots in ([options.gpus] if options.gpus else (1, 2, 4, 8))
    ]
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


def _training(options: Options, slots: int) -> Training:
    shared = {key: value for key, value in vars(options).items() if key not in ("gpus", "gpu_type")}
    return replace(Training(**shared), slots=slots)


def _drawn(data: dict[str, Any], found: list[Estimate], available: float | None) -> Any:
    parts = list(found[0].parts)
    rows = [
        (one.slots, one.total_gb, *(round(one.parts[part] / 2**30, 2) for part in parts), *_fits(one, available))
        for one in found
    ]
    columns = ("gpus", "gib per gpu", *parts, *(("fits",) if available else ()))
    head = pairs(
        [
            ("parameters", f"{data['parameters'] / 1e6:,.1f} M, trained {data['trainable_parameters'] / 1e6:,.1f} M"),
            ("2.5× rule", f"{data['rule_memory_gb']} GB"),
        ]
    )
    return Group(head, table(columns, rows))


def _fits(one: Estimate, available: float | None) -> tuple[str, ...]:
    return () if available is None else ("yes" if one.total_gb <= available else "no",)
