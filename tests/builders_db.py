"""Rows for tests, a line each. What a row refers to is made with it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db import ids
from app.db.models import BaseModel, Dataset, Environment, Job, Node, Tenant
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database
from app.db.tenants import ensure_tenant
from app.settings import QuotaSettings
from cluster.core.events import Grant
from cluster.core.job import Job as CoreJob
from cluster.core.job import Placement, Shape

TINY_CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}


def make_tenant(session: Session, tenant: str = "acme", **quota: Any) -> Tenant:
    return ensure_tenant(session, tenant, QuotaSettings(**quota))


def make_base_model(session: Session, name: str = "tiny", **fields: Any) -> BaseModel:
    """The one of that name, made when it is missing; ready."""
    found = session.scalar(select(BaseModel).where(BaseModel.name == name))
    if found is not None:
        return found
    row = {
        "id": ids.new_id(ids.BASE_MODEL),
        "name": name,
        "status": "ready",
        "source": f"/models/{name}",
        "prefix": f"base-models/{name}",
        "sha256": "b" * 64,
        "config": TINY_CONFIG,
        "parameters": 100_000,
        "bytes": 400_000,
    }
    return _add(session, BaseModel(**{**row, **fields}))


def make_dataset(session: Session, tenant: str = "acme", name: str = "rows", **fields: Any) -> Dataset:
    make_tenant(session, tenant)
    row = {
        "id": ids.new_id(ids.DATASET),
        "tenant_id": tenant,
        "name": name,
        "version": 1,
        "format": "messages",
        "task": "causal_lm",
        "rows": 8,
        "bytes": 800,
        "sha256": "d" * 64,
        "source_sha256": "e" * 64,
        "object_key": f"tenants/{tenant}/datasets/{name}/rows.jsonl",
        "report": {},
        "max_chars": 100,
    }
    return _add(session, Dataset(**{**row, **fields}))


def make_environment(session: Session, tenant: str = "acme", name: str = "mine", **fields: Any) -> Environment:
    make_tenant(session, tenant)
    row = {
        "id": ids.new_id(ids.ENVIRONMENT),
        "tenant_id": tenant,
        "name": name,
        "version": 1,
        "spec": f"name: {name}\n",
        "lock": {"kind": "host", "packages": []},
        "fingerprint": "f" * 64,
        "dependency_md5": "a" * 32,
    }
    return _add(session, Environment(**{**row, **fields}))


def make_job(session: Session, tenant: str = "acme", **fields: Any) -> Job:
    """Queued, one cpu slot; with a dataset and base model of its own making."""
    made = {"base_model_id": make_base_model(session).id} if "base_model_id" not in fields else {}
    if "dataset_id" not in fields:
        job_rows = ids.new_id("rows-")[:20]
        made["dataset_id"] = make_dataset(session, tenant, job_rows).id
    row = {
        "id": ids.new_id(ids.JOB),
        "tenant_id": tenant,
        "state": "queued",
        "priority": "normal",
        "request": {},
        "method": "sft",
        "training_type": "lora",
        "task": "causal_lm",
        "hyperparams": {"epochs": 1, "batch_size": 2},
        "precision": "fp32",
        "resource_config": {},
        "shape": {"slots": 1, "memory_gb": 1.0, "kinds": ["cpu"], "nodes": 1},
        "estimate": {},
        "lock": {"kind": "host", "packages": []},
        "fingerprint": "f" * 64,
        "output_model": "tuned",
        "user_metadata": {},
        "created_by": "test",
    }
    return _add(session, Job(**{**row, **made, **fields}))


def make_node(session: Session, name: str = "n1", **fields: Any) -> Node:
    row = {"name": name, "kind": "cpu", "slots": 2, "memory_gb": 4.0, "environments": [], "models": []}
    return _add(session, Node(**{**row, **fields}))


def queued_job(database: Database, tenant: str = "acme", **fields: Any) -> str:
    """The id of a committed queued job."""
    with database.platform() as session:
        return make_job(session, tenant, **fields).id


def core_job(job_id: str, tenant: str = "acme", attempt: int = 0) -> CoreJob:
    return CoreJob(id=job_id, tenant=tenant, shape=Shape(1, 1.0), queued_at=0.0, attempt=attempt)


def grant(
    store: SqlSchedulerStore, epoch: int, job_id: str, placement: Placement, attempt: int = 0, ttl_s: float = 30.0
) -> int | None:
    """The new attempt; None: refused."""
    job = core_job(job_id, attempt=attempt)
    return store.grant(epoch, [Grant(job, placement, job.shape)], ttl_s).get(job_id)


def granted_job(database: Database, store: SqlSchedulerStore, epoch: int, slot: int = 0) -> str:
    """The id of a job whose first attempt holds one slot of node n1 and is preparing."""
    job_id = queued_job(database)
    assert grant(store, epoch, job_id, Placement({"n1": (slot,)})) == 1
    return job_id


def _add(session: Session, row: Any) -> Any:
    session.add(row)
    session.flush()
    session.refresh(row)
    return row
