"""Reads all that one attempt of a job needs, from the rows it refers to."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, Code, Dataset, Event, Job, Lease, ModelVersion, Table, Tenant
from cluster.core.job import JobState, Node, Placement
from cluster.errors import Conflict, NotFound
from cluster.storage.objects import folder_sha256
from trainers.config import Hyperparams
from trainers.run.ports import OUT_OF_MEMORY, Assignment, LastCheckpoint, Script

T = TypeVar("T", bound=Table)


def read_assignment(session: Session, job: Job) -> Assignment:
    """Raises `Conflict` when the base model is not ready."""
    return _read(session, job, job.attempt, *_placement(session, job))


def read_upcoming(session: Session, job: Job, node: Node) -> Assignment:
    """Of a job that waits, as if its next attempt had all of `node`. Raises as `read_assignment`."""
    return _read(session, job, job.attempt + 1, Placement({node.name: tuple(range(node.slots))}), node.kind)


def _read(session: Session, job: Job, attempt: int, placement: Placement, kind: str) -> Assignment:
    base_prefix, base_sha256, adapter_prefix = _weights(session, job)
    begins_with = _get(session, Checkpoint, job.parent_checkpoint_id) if job.parent_checkpoint_id else None
    train = _get(session, Dataset, job.dataset_id)
    validation = _get(session, Dataset, job.validation_dataset_id) if job.validation_dataset_id else None
    checkpoint = _last_checkpoint(session, job.id)
    return Assignment(
        job_id=job.id,
        tenant=job.tenant_id,
        attempt=attempt,
        placement=placement,
        kind=kind,
        method=job.method,
        training_type=job.training_type,
        task=job.task,
        hyperparams=Hyperparams(**job.hyperparams),
        precision=job.precision,
        memory_limit_gb=job.resource_config.get("mem_limit_gb"),
        base_model_name=_get(session, BaseModel, job.base_model_id).name,
        base_model_prefix=base_prefix,
        base_model_sha256=base_sha256,
        adapter_prefix=begins_with.prefix if begins_with is not None else adapter_prefix,
        dataset_key=train.object_key,
        dataset_sha256=train.sha256,
        validation_key=validation.object_key if validation else None,
        validation_sha256=validation.sha256 if validation else None,
        lock=job.lock,
        fingerprint=job.fingerprint,
        checkpoint=_told(checkpoint),
        output_model=job.output_model,
        max_runtime_s=job.max_runtime_s,
        ran_s=job.ran_s,
        metadata=job.user_metadata,
        uid=_get(session, Tenant, job.tenant_id).uid,
        script=_script(session, job),
        best=_told(_best_checkpoint(session, checkpoint)),
        outputs=tuple(job.request.get("outputs") or ()),
        short_of_memory=_short_of_memory(session, job.id),
    )


def _short_of_memory(session: Session, job_id: str) -> bool:
    """Whether an attempt recovered from that before."""
    code = Event.data["error"]["code"].astext
    recovered = (Event.type == "state", Event.data["to"].astext == JobState.RECOVERING, code.in_(OUT_OF_MEMORY))
    return session.scalar(select(Event.seq).where(Event.job_id == job_id, *recovered).limit(1)) is not None


def _script(session: Session, job: Job) -> Script | None:
    if job.script is None:
        return None
    script = Script(job.script["entrypoint"], job.script["params"])
    if job.code_id is None:
        return script
    code = _get(session, Code, job.code_id)
    return replace(script, prefix=code.prefix, files=code.files)


def _placement(session: Session, job: Job) -> tuple[Placement, str]:
    leases = session.scalars(select(Lease).where(Lease.job_id == job.id, Lease.attempt == job.attempt)).all()
    return Placement({lease.node: tuple(lease.slots) for lease in leases}), leases[0].kind


def _weights(session: Session, job: Job) -> tuple[str, str, str | None]:
    """Prefix and hash of the base model's folder, prefix of the adapter to go on from. A tuned version with all weights
    stands in for the base."""
    base = _get(session, BaseModel, job.base_model_id)
    parent = _get(session, ModelVersion, job.parent_version_id) if job.parent_version_id else None
    if parent is not None and parent.kind == "model":
        return parent.prefix, folder_sha256(parent.files), None
    if base.prefix is None or base.sha256 is None:
        raise Conflict(
            f"base model {base.name} is {base.status}, not ready",
            code="base_model_not_ready",
            hint="Register it again.",
            fixable_by="operator",
        )
    return base.prefix, base.sha256, parent.prefix if parent is not None else None


def _last_checkpoint(session: Session, job_id: str) -> Checkpoint | None:
    newest = select(Checkpoint).where(Checkpoint.job_id == job_id)
    return session.scalar(newest.order_by(Checkpoint.step.desc(), Checkpoint.attempt.desc()).limit(1))


def _best_checkpoint(session: Session, last: Checkpoint | None) -> Checkpoint | None:
    """What `last` calls the best step so far, where that is another one."""
    step = last.metrics.get("best_step") if last is not None else None
    if last is None or not isinstance(step, int) or step == last.step:
        return None
    rows = select(Checkpoint).where(Checkpoint.job_id == last.job_id, Checkpoint.step == step)
    return session.scalar(rows.order_by(Checkpoint.attempt.desc()).limit(1))


def _told(row: Checkpoint | None) -> LastCheckpoint | None:
    return LastCheckpoint(row.step, row.attempt, row.prefix, row.files) if row is not None else None


def _get(session: Session, table: type[T], key: str) -> T:
    row = session.get(table, key)
    if row is None:
        raise NotFound(f"{table.__tablename__} {key} is gone", fixable_by="operator")
    return row
