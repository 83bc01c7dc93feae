"""A job in words: a line for an event, a table row, what came of it, and why it failed and what to do now."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from app.cli.client import Client
from app.cli.output import cell, clean, pairs
from app.cli.progress import Progress
from app.cli.units import ago, clock, span

LAST_LINES = 10
TURN = {"user": "yours", "operator": "your operator's", "nobody": "nobody's: try again"}
LEVELS = {"error": "ERROR ", "warn": "warning: ", "warning": "warning: "}


def event_line(event: dict[str, Any], progress: Progress | None = None) -> str:
    """One line; for `metrics` where the job stands."""
    stamp = clock(event.get("created_at"))
    if event.get("type") == "metrics" and progress is not None:
        return f"{stamp}  {progress.summary()}"
    level = LEVELS.get(event.get("level", "info"), "")
    return f"{stamp}  {event.get('type', 'event'):<10} {level}{event.get('message', '')}"


JOB_COLUMNS = ("id", "status", "base model", "dataset", "type", "model", "created")


def job_row(job: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("id", "status", "base_model", "dataset_id", "training_type", "fine_tuned_model")
    return (*(job.get(key) for key in keys), ago(job.get("created_at")))


def summary(job: dict[str, Any]) -> RenderableType:
    details = job.get("status_details") or {}
    reason = f" ({details['reason']})" if details.get("reason") else ""
    error = job.get("error") or {}
    return pairs(
        [
            ("id", job["id"]),
            ("status", f"{job['status']}{reason}"),
            ("why", error.get("message")),
            ("hint", error.get("hint")),
            ("position", details.get("position")),
            ("base model", job.get("base_model")),
            ("dataset", job.get("dataset_id")),
            ("validation", job.get("validation_dataset_id")),
            ("method", " ".join(filter(None, (job.get("method"), job.get("training_type"))))),
            ("script", " ".join(filter(None, (job.get("code"), job.get("entrypoint"))))),
            ("params", job.get("params")),
            ("hyperparams", job.get("hyperparams")),
            ("environment", job.get("environment")),
            ("asked for", job.get("resource_config")),
            ("granted", job.get("granted")),
            ("budget", job.get("budget")),
            ("estimate", memory_line(job.get("estimate"))),
            ("actual", job.get("actual")),
            ("progress", job.get("progress")),
            ("model", job.get("fine_tuned_model")),
            ("attempt", job.get("attempt")),
            ("metadata", job.get("metadata")),
            *((name.replace("_", " "), _moment(job.get(name))) for name in TIMES),
        ]
    )


TIMES = ("created_at", "started_at", "finished_at", "estimated_start", "estimated_finish")


def _moment(value: Any) -> str | None:
    return None if value is None else ago(value)


def memory_line(estimate: Any) -> str | None:
    if not isinstance(estimate, dict):
        return None
    return cell({key: value for key, value in estimate.items() if not isinstance(value, dict | list)})


def result(job: dict[str, Any]) -> RenderableType:
    """Of a job that succeeded: the model, and the next commands."""
    model = job.get("fine_tuned_model")
    took = None
    if job.get("started_at") and job.get("finished_at"):
        took = span(job["finished_at"] - job["started_at"])
    return pairs(
        [
            ("succeeded", model or job["id"]),
            ("took", took),
            ("numbers", memory_line(job.get("actual"))),
            ("look at it", f"heliostat models show {model}" if model else None),
            ("get it", f"heliostat models download {model}" if model else None),
        ]
    )


def failure(client: Client, job: dict[str, Any]) -> RenderableType:
    """Code, one sentence, whose turn, where, memory, last checkpoint, the next command, last log lines."""
    path, error = f"/finetune/{job['id']}", job.get("error") or {}
    checkpoints = client.get(f"{path}/checkpoints", limit=1)["data"]
    log = client.call("GET", f"{path}/logs", params={"tail": LAST_LINES}).text
    facts = pairs(
        [
            ("failed", f"{job['id']}: {error.get('code', 'no code')}"),
            ("what", error.get("message")),
            ("field", error.get("param")),
            ("whose turn", TURN.get(error.get("fixable_by") or "", error.get("fixable_by"))),
            ("hint", error.get("hint")),
            ("where", _where(job)),
            ("memory", _memory(job)),
            ("last checkpoint", _checkpoint(checkpoints[0]) if checkpoints else "none"),
            ("next", _next(job)),
        ]
    )
    lines = [clean(line) for line in log.splitlines()[-LAST_LINES:]]
    return Group(facts, Text("last log lines:", "dim"), *(Text(f"  {line}") for line in lines or ["(none)"]))


def _where(job: dict[str, Any]) -> str:
    progress = job.get("progress") or {}
    stage = progress.get("stage") or (job.get("status_details") or {}).get("reason") or ""
    step, steps = progress.get("step"), progress.get("steps") or progress.get("total_steps")
    place = f"step {step}" + (f" of {steps}" if steps else "") if step is not None else "before the first step"
    return f"{place}, attempt {job.get('attempt', 0)}" + (f", {stage}" if stage else "")


def _memory(job: dict[str, Any]) -> str | None:
    limit = (job.get("resource_config") or {}).get("mem_limit_gb")
    estimated = (job.get("estimate") or {}).get("memory_gb")
    parts = [("limit", limit), ("estimated", estimated)]
    told = [f"{name} {value:g} GiB" for name, value in parts if isinstance(value, int | float)]
    return ", ".join(told) or None


def _checkpoint(checkpoint: dict[str, Any]) -> str:
    return f"step {checkpoint.get('step')} ({checkpoint['id']}, {ago(checkpoint.get('created_at'))})"


def _next(job: dict[str, Any]) -> str:
    mine = (job.get("error") or {}).get("fixable_by") == "user"
    if mine:
        return f"heliostat jobs logs {job['id']}  # mend it, then: heliostat finetune …"
    return f"heliostat jobs retry {job['id']}"
