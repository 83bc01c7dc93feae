"""Registers what a job made: the model of its output name and the next version of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.ids import MODEL, MODEL_VERSION, new_id
from app.db.models import Job, Model, ModelVersion


@dataclass(frozen=True)
class Result:
    """`files`: name → sha256, under `prefix` in storage."""

    prefix: str
    files: dict[str, str]
    metrics: dict[str, Any]
    lineage: dict[str, Any]


def version_of_job(session: Session, job: Job) -> str | None:
    """`name@version` when the job has registered one."""
    made = session.scalar(select(ModelVersion.id).where(ModelVersion.job_id == job.id))
    return job.fine_tuned_model if made is not None else None


def _kind(job: Job, files: dict[str, str]) -> str:
    """A script's version is what its files make it."""
    if job.method != "custom":
        return "adapter" if job.training_type in ("lora", "qlora") else "model"
    if "adapter_config.json" in files:
        return "adapter"
    return "model" if "config.json" in files else "files"


def register_version(session: Session, job: Job, result: Result) -> str:
    """The new `name@version`, also noted on the job. Once per job: the table refuses a second one."""
    new = insert(Model).values(id=new_id(MODEL), tenant_id=job.tenant_id, name=job.output_model)
    session.execute(
        new.on_conflict_do_nothing(index_elements=["tenant_id", "name"], index_where=Model.deleted_at.is_(None))
    )
    model_id, number = session.execute(
        update(Model)
        .where(Model.tenant_id == job.tenant_id, Model.name == job.output_model, Model.deleted_at.is_(None))
        .values(last_version=Model.last_version + 1)
        .returning(Model.id, Model.last_version)
        .execution_options(synchronize_session=False)
    ).one()
    session.add(
        ModelVersion(
            id=new_id(MODEL_VERSION),
            model_id=model_id,
            tenant_id=job.tenant_id,
            version=number,
            job_id=job.id,
            kind=_kind(job, result.files),
            prefix=result.prefix,
            files=result.files,
            metrics=result.metrics,
            lineage=result.lineage,
        )
    )
    job.fine_tuned_model = f"{job.output_model}@{number}"
    session.flush()
    return job.fine_tuned_model
