"""A job's row as the job object that both doors show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Code, Dataset, Environment, Step
from app.db.models import Job as JobRow
from app.schemas.finetune import Job, JobError, JobStatus, StatusDetails
from app.services.forecasts import Forecast
from cluster.core.job import TERMINAL, JobState

STATUS: dict[JobState, JobStatus] = {
    JobState.VALIDATING: "validating_files",
    JobState.QUEUED: "queued",
    JobState.PROVISIONING: "queued",
    JobState.PREPARING: "queued",
    JobState.RUNNING: "running",
    JobState.PARKED: "running",
    JobState.SUSPENDED: "running",
    JobState.RECOVERING: "running",
    JobState.ARCHIVING: "running",
    JobState.PAUSED: "paused",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


WAITS = frozenset({JobState.QUEUED, JobState.PROVISIONING, JobState.PARKED, JobState.SUSPENDED})


def states_of(status: str) -> list[str]:
    """All states that show as this status."""
    return [str(state) for state, shown in STATUS.items() if shown == status]


@dataclass(frozen=True)
class Progress:
    """The last step that is in the weights, and the mean seconds of a step."""

    step: int
    loss: float
    epoch: float
    mean_s: float


@dataclass(frozen=True)
class Around:
    """What the rows of some jobs refer to, read at once."""

    base_models: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    environments: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Progress] = field(default_factory=dict)


@dataclass(frozen=True)
class Ahead:
    """Places in the line, and what is foretold; of all jobs."""

    positions: Mapping[str, int] = field(default_factory=dict)
    forecast: Forecast = field(default_factory=Forecast)


def read_around(session: Session, jobs: Sequence[JobRow]) -> Around:
    bases = {job.base_model_id for job in jobs}
    datasets = {key for job in jobs for key in (job.dataset_id, job.validation_dataset_id) if key}
    environments = {job.environment_id for job in jobs if job.environment_id}
    code = {job.code_id for job in jobs if job.code_id}
    return Around(
        base_models={row.id: row.name for row in session.scalars(select(BaseModel).where(BaseModel.id.in_(bases)))},
        datasets={
            row.id: f"{row.name}@{row.version}"
            for row in session.scalars(select(Dataset).where(Dataset.id.in_(datasets)))
        },
        environments={
            row.id: f"{row.name}@{row.version}"
            for row in session.scalars(select(Environment).where(Environment.id.in_(environments)))
        },
        code={row.id: f"{row.name}@{row.version}" for row in session.scalars(select(Code).where(Code.id.in_(code)))},
        progress=_progress(session, [job.id for job in jobs]),
    )


def _progress(session: Session, job_ids: Sequence[str]) -> dict[str, Progress]:
    last = (
        select(Step.job_id, func.max(Step.step).label("step"), func.avg(Step.seconds).label("mean_s"))
        .where(Step.job_id.in_(job_ids))
        .group_by(Step.job_id)
        .subquery()
    )
    rows = session.execute(
        select(Step, last.c.mean_s).join(last, (Step.job_id == last.c.job_id) & (Step.step == last.c.step))
    )
    return {step.job_id: Progress(step.step, step.loss, step.epoch, float(mean_s)) for step, mean_s in rows}


def view(job: JobRow, around: Around, ahead: Ahead, now: datetime) -> Job:
    state = JobState(job.state)
    progress = around.progress.get(job.id)
    base, dataset = around.base_models[job.base_model_id], around.datasets[job.dataset_id]
    return Job(
        id=job.id,
        tenant_id=job.tenant_id,
        status=STATUS[state],
        status_details=StatusDetails(
            state=job.state,
            reason=_reason(job, ahead.forecast, now),
            since=unix(job.state_since),
            position=ahead.positions.get(job.id),
        ),
        created_at=unix(job.created_at),
        started_at=_unix_or_none(job.started_at),
        finished_at=_unix_or_none(job.finished_at),
        estimated_start=_estimated_start(job, ahead.forecast),
        estimated_finish=_estimated_finish(job, progress, ahead.forecast, now),
        base_model=job.request.get("base_model", base),
        model=base,
        dataset_id=job.request.get("dataset_id", dataset),
        training_file=job.dataset_id,
        validation_dataset_id=around.datasets.get(job.validation_dataset_id or ""),
        environment=around.environments.get(job.environment_id or ""),
        environment_fingerprint=job.fingerprint,
        code=around.code.get(job.code_id or ""),
        entrypoint=job.request.get("entrypoint"),
        params=(job.script or {}).get("params"),
        method=job.method,
        training_type=job.training_type,
        task=job.task,
        hyperparams=job.hyperparams,
        precision=job.precision,
        priority=job.priority,
        resource_config=job.resource_config,
        granted=job.granted,
        estimate=job.estimate,
        actual=job.actual,
        budget=job.budget,
        progress=_shown(job, progress),
        error=JobError(**job.error) if job.error else None,
        output_model=job.output_model,
        fine_tuned_model=job.fine_tuned_model,
        attempt=job.attempt,
        metadata=job.user_metadata,
        created_by=job.created_by,
    )


def _shown(job: JobRow, progress: Progress | None) -> dict[str, Any] | None:
    if progress is None:
        return None
    steps = job.estimate.get("steps")
    return {
        "step": progress.step,
        "steps": steps,
        "epoch": progress.epoch,
        "loss": progress.loss,
        "seconds_per_step": round(progress.mean_s, 3),
    }


def _estimated_start(job: JobRow, forecast: Forecast) -> int | None:
    """Of a job that waits: as likely earlier as later."""
    return _whole(forecast.of(job.id).start.p50) if job.state in WAITS else None


def _estimated_finish(job: JobRow, progress: Progress | None, forecast: Forecast, now: datetime) -> int | None:
    """As likely earlier as later. A running job that the look ahead has not seen yet: from the mean of its steps."""
    if job.state in TERMINAL or job.state == JobState.PAUSED:
        return None
    foretold, steps = forecast.of(job.id).finish.p50, job.estimate.get("steps")
    if foretold is not None or progress is None or steps is None or job.state != JobState.RUNNING:
        return _whole(foretold)
    return unix(now) + int(max(0, steps - progress.step) * progress.mean_s)


def _reason(job: JobRow, forecast: Forecast, now: datetime) -> str:
    """While others have their turn: about how long still."""
    start = forecast.of(job.id).start.p50
    if start is None or job.state not in (JobState.PARKED, JobState.SUSPENDED):
        return job.reason
    minutes = max(1, round((start - now.timestamp()) / 60))
    return f"{job.reason}; its next turn comes in about {minutes} min"


def _whole(moment: float | None) -> int | None:
    return None if moment is None else int(moment)


def unix(time: datetime) -> int:
    return int(time.timestamp())


def _unix_or_none(time: datetime | None) -> int | None:
    return None if time is None else unix(time)
