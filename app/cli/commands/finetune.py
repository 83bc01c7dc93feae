"""`finetune`: a request from a file (the POST body as YAML), from options, or both; options win."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Group, RenderableType
from rich.text import Text

from app.cli.client import given
from app.cli.command import command
from app.cli.commands import code, watch
from app.cli.job_text import memory_line
from app.cli.output import clean, pairs
from app.cli.session import Session
from app.cli.units import assignments, scalar, seconds_of
from cluster.errors import InvalidRequest

MODEL, RUN = "What to train", "Where and how"


class NumberLoader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-5` as text; people mean a number."""


NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class What:
    base_model: Annotated[str | None, typer.Option(rich_help_panel=MODEL)] = None
    dataset: Annotated[str | None, typer.Option(help="Id, name or name@version.", rich_help_panel=MODEL)] = None
    validation_dataset: Annotated[str | None, typer.Option(rich_help_panel=MODEL)] = None
    validation_split: Annotated[float | None, typer.Option(help="Share of the rows.", rich_help_panel=MODEL)] = None
    from_: Annotated[
        str | None, typer.Option("--from", metavar="VERSION", help="Go on from a tuned model.", rich_help_panel=MODEL)
    ] = None
    method: Annotated[str | None, typer.Option(help="sft, dpo or custom.", rich_help_panel=MODEL)] = None
    training_type: Annotated[str | None, typer.Option(help="lora, qlora or full.", rich_help_panel=MODEL)] = None
    task: Annotated[str | None, typer.Option(help="causal_lm or sequence_classification.", rich_help_panel=MODEL)] = (
        None
    )
    hyper: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="For instance lr=3e-5.", rich_help_panel=MODEL)
    ] = None
    entrypoint: Annotated[
        str | None,
        typer.Option(metavar="'FILE.py …'", help="custom: what Python is started with.", rich_help_panel=MODEL),
    ] = None
    code: Annotated[
        str | None,
        typer.Option(metavar="DIR|FILE|REF", help="custom: a folder or archive is uploaded.", rich_help_panel=MODEL),
    ] = None
    param: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="custom: for the script.", rich_help_panel=MODEL)
    ] = None
    output_model: Annotated[str | None, typer.Option(help="Name of the result.", rich_help_panel=MODEL)] = None
    output: Annotated[
        list[str] | None, typer.Option(help="A form beside the adapter: merged, gguf.", rich_help_panel=MODEL)
    ] = None
    suffix: Annotated[str | None, typer.Option(rich_help_panel=MODEL)] = None
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", rich_help_panel=MODEL)] = None


@dataclass(frozen=True)
class Where:
    gpus: Annotated[
        str | None, typer.Option(metavar="TYPE[:N]", help="A100:8, A100,H100:2, 4, cpu.", rich_help_panel=RUN)
    ] = None
    nodes: Annotated[int | None, typer.Option(min=1, help="Spread over at most so many.", rich_help_panel=RUN)] = None
    mem_limit_gb: Annotated[float | None, typer.Option(help="GiB per GPU, at most.", rich_help_panel=RUN)] = None
    market: Annotated[str | None, typer.Option(help="any, on_demand, spot.", rich_help_panel=RUN)] = None
    max_runtime: Annotated[str | None, typer.Option(metavar="H", help="Hours, or 90m, 24h.", rich_help_panel=RUN)] = (
        None
    )
    priority: Annotated[str | None, typer.Option(help="urgent, high, normal, low.", rich_help_panel=RUN)] = None
    region: Annotated[str | None, typer.Option(help="Only nodes there.", rich_help_panel=RUN)] = None
    budget_gpu_hours: Annotated[
        float | None, typer.Option(metavar="H", help="Pause at a checkpoint when used up.", rich_help_panel=RUN)
    ] = None
    budget_usd: Annotated[float | None, typer.Option(help="The same, in USD.", rich_help_panel=RUN)] = None
    env: Annotated[str | None, typer.Option(help="Environment.", rich_help_panel=RUN)] = None


@dataclass(frozen=True)
class How:
    file: Annotated[
        Path | None, typer.Option("-f", "--file", exists=True, dir_okay=False, help="job.yaml: the POST body as YAML.")
    ] = None
    watch: Annotated[bool, typer.Option("--watch", help="Stay and look on.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would need.")] = False


def register(app: typer.Typer) -> None:
    command(app, "finetune")(finetune)


def finetune(session: Session, how: How, what: What, where: Where) -> None:
    """Trains a model. Answers at once; --watch looks on until the end."""
    body = merged(_from_file(how.file), body_of(what, where))
    if session.given.tenant:
        body["tenant_id"] = session.given.tenant
    _check(body)
    client = session.client()
    if what.code is not None and Path(what.code).exists():
        body["code"] = code.send(session, Path(what.code))["ref"]
    if how.dry_run:
        estimate = client.post("/finetune/estimate", body)
        session.out.show(estimate, lambda: _estimated(estimate))
        return
    job = client.post("/finetune", body)
    if how.watch:
        watch.follow(session, job)
        return
    session.out.show(
        job,
        lambda: pairs(
            [("job", job["id"]), ("status", job["status"]), ("look on", f"heliostat jobs watch {job['id']}")]
        ),
    )


def _estimated(estimate: dict[str, Any]) -> RenderableType:
    told = {**estimate, "estimate": memory_line(estimate.get("estimate")), "warnings": None, "object": None}
    warnings = (Text(f"warning: {clean(warning)}", "yellow") for warning in estimate.get("warnings", []))
    return Group(pairs((key.replace("_", " "), value) for key, value in told.items()), *warnings)


def body_of(what: What, where: Where) -> dict[str, Any]:
    """Only what was said."""
    resources = {
        **gpus_of(where.gpus),
        **given(
            {
                "num_nodes": where.nodes,
                "mem_limit_gb": where.mem_limit_gb,
                "market": where.market,
                "region": where.region,
            }
        ),
        **({"max_runtime_hours": _hours(where.max_runtime)} if where.max_runtime else {}),
    }
    hyper = {key: scalar(value) for key, value in assignments(what.hyper or [], "--hyper").items()}
    body = {
        "base_model": _base(what),
        "dataset_id": what.dataset,
        "validation_dataset_id": what.validation_dataset,
        "validation_split": what.validation_split,
        "method": what.method or ("custom" if what.entrypoint else None),
        "entrypoint": what.entrypoint,
        "code": what.code,
        "params": {key: scalar(value) for key, value in assignments(what.param or [], "--param").items()} or None,
        "training_type": what.training_type,
        "task": what.task,
        "hyperparams": hyper or None,
        "output_model": what.output_model,
        "outputs": what.output or None,
        "suffix": what.suffix,
        "metadata": assignments(what.metadata or [], "--metadata") or None,
        "resource_config": resources or None,
        "priority": where.priority,
        "environment": where.env,
        "budget": given({"gpu_hours": where.budget_gpu_hours, "usd": where.budget_usd}) or None,
    }
    return given(body)


def _base(what: What) -> str | None:
    if what.from_ and what.base_model:
        raise InvalidRequest(
            "--from and --base-model both say what to start from", param="--from", hint="give one of them"
        )
    return what.from_ or what.base_model


def gpus_of(text: str | None) -> dict[str, Any]:
    """`A100:8`, `A100`, `8`, `A100,H100:2` (tried in order)."""
    if not text:
        return {}
    names, _, count = text.partition(":")
    if names.isdigit():
        names, count = "", names
    if count and not (count.isdigit() and int(count) > 0):
        raise InvalidRequest(
            f"--gpus {text!r} does not end in a number", param="--gpus", hint="write A100:8, A100 or 8"
        )
    kinds = [name.strip() for name in names.split(",") if name.strip()]
    found: dict[str, Any] = {"gpu_type": kinds[0] if len(kinds) == 1 else kinds} if kinds else {}
    return {**found, "num_gpus": int(count)} if count else found


def _hours(text: str) -> float:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else seconds_of(text, "--max-runtime") / 3600


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        # NumberLoader is a SafeLoader.
        body = yaml.load(file.read_text(), Loader=NumberLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{file} is not YAML: {error}", param="--file") from error
    if not isinstance(body, dict):
        raise InvalidRequest(
            f"{file} holds no mapping", param="--file", hint="it is the body of POST /api/v1/finetune as YAML"
        )
    return body


def merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins, key by key, also inside mappings."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def _check(body: dict[str, Any]) -> None:
    """What no request can do without; everything else is the service's to judge."""
    for field, option in (("base_model", "--base-model"), ("dataset_id", "--dataset")):
        if not body.get(field):
            raise InvalidRequest(
                f"{option} is missing", param=field, hint="`heliostat base-model ls`, `heliostat dataset ls`"
            )
