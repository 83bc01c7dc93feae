"""The tables. Tenant-scoped ones carry `tenant_id` and stand under row-level security (see the first migration).

All times are timestamptz. Ids are text: a prefix and a random part, made by `app.db.ids`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Table(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: JSONB,
        list[Any]: JSONB,
        datetime: DateTime(timezone=True),
        str: Text,
        float: Float,
    }


def _now() -> Mapped[datetime]:
    return mapped_column(server_default=func.now())


def _tenant() -> Mapped[str]:
    return mapped_column(ForeignKey("tenants.id"), index=True)


class Tenant(Table):
    __tablename__ = "tenants"
    id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = _now()
    max_queued_jobs: Mapped[int]
    max_slots: Mapped[int | None]
    uid: Mapped[int | None] = mapped_column(unique=True)  # the tenant's own user id in sandboxes
    weight: Mapped[float] = mapped_column(server_default="1")
    guaranteed_slots: Mapped[int] = mapped_column(server_default="0")
    urgent_slots: Mapped[int | None]  # None: the scheduler's usual share
    gpu_hours_per_month: Mapped[float | None]


class Dataset(Table):
    """One version of a named dataset. `object_key`: the canonical rows; `source_sha256`: of what was uploaded."""

    __tablename__ = "datasets"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str]
    version: Mapped[int]
    format: Mapped[str]
    task: Mapped[str]
    rows: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    source_sha256: Mapped[str]
    object_key: Mapped[str]
    report: Mapped[dict[str, Any]]
    max_chars: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = _now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("tenant_id", "name", "version"),)


class BaseModel(Table):
    """A base model that all tenants may use; registered by operators. `prefix`: its folder in storage."""

    __tablename__ = "base_models"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    status: Mapped[str]  # preparing, ready, failed
    source: Mapped[str]
    prefix: Mapped[str | None]
    sha256: Mapped[str | None]
    config: Mapped[dict[str, Any] | None]
    parameters: Mapped[int | None] = mapped_column(BigInteger)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    chat_template: Mapped[str | None]  # as asked for; None: the model's own, else ChatML
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = _now()
    claimed_at: Mapped[datetime | None]


class Environment(Table):
    """One version of a named environment; the newest version is what the name means. Old jobs keep theirs."""

    __tablename__ = "environments"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str]
    version: Mapped[int]
    spec: Mapped[str]  # the environment.yml as sent
    lock: Mapped[dict[str, Any]]
    fingerprint: Mapped[str]
    dependency_md5: Mapped[str]
    created_at: Mapped[datetime] = _now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("tenant_id", "name", "version"),)


class Code(Table):
    """One version of a tenant's code, for jobs of method `custom`; its files lie under `prefix`."""

    __tablename__ = "code"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str]
    version: Mapped[int]
    files: Mapped[dict[str, Any]]  # name → sha256
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]  # of names and hashes
    source_sha256: Mapped[str]
    prefix: Mapped[str]
    created_at: Mapped[datetime] = _now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("tenant_id", "name", "version"),)


class Job(Table):
    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    state: Mapped[str] = mapped_column(index=True)
    wish: Mapped[str] = mapped_column(server_default="run")
    reason: Mapped[str] = mapped_column(server_default="")
    attempt: Mapped[int] = mapped_column(server_default="0")
    epoch: Mapped[int] = mapped_column(BigInteger, server_default="0")
    fruitless_attempts: Mapped[int] = mapped_column(server_default="0")
    last_seq: Mapped[int] = mapped_column(BigInteger, server_default="0")
    priority: Mapped[str]
    request: Mapped[dict[str, Any]]  # as accepted
    method: Mapped[str]
    training_type: Mapped[str]
    task: Mapped[str]
    hyperparams: Mapped[dict[str, Any]]  # resolved, trainers.config.Hyperparams
    precision: Mapped[str]
    resource_config: Mapped[dict[str, Any]]  # as asked
    shape: Mapped[dict[str, Any]]  # cluster.core.job.Shape
    estimate: Mapped[dict[str, Any]]
    actual: Mapped[dict[str, Any] | None]
    granted: Mapped[dict[str, Any] | None]
    base_model_id: Mapped[str] = mapped_column(ForeignKey("base_models.id"))
    parent_version_id: Mapped[str | None] = mapped_column(ForeignKey("model_versions.id", use_alter=True))
    parent_checkpoint_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id", use_alter=True), index=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    validation_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"))
    environment_id: Mapped[str | None] = mapped_column(ForeignKey("environments.id"))
    code_id: Mapped[str | None] = mapped_column(ForeignKey("code.id"))
    script: Mapped[dict[str, Any] | None]  # of method custom: entrypoint, params
    lock: Mapped[dict[str, Any]]
    fingerprint: Mapped[str]
    output_model: Mapped[str]
    fine_tuned_model: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    user_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    created_by: Mapped[str]
    created_at: Mapped[datetime] = _now()
    queued_at: Mapped[datetime] = _now()
    state_since: Mapped[datetime] = _now()
    progress_at: Mapped[datetime] = _now()
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    ran_s: Mapped[float] = mapped_column(server_default="0")
    max_runtime_s: Mapped[float | None]
    budget: Mapped[dict[str, Any] | None]  # gpu_hours, usd
    attained_s: Mapped[float] = mapped_column(server_default="0")  # holding its slots, in turns that are over
    turns: Mapped[int] = mapped_column(server_default="0")
    moved: Mapped[bool] = mapped_column(server_default="false")  # we or a fault took its slots: the next start is on us


class Event(Table):
    """Numbered per job under the job row's lock: the numbers commit in order, without gaps. `xid` orders a tenant's
    tail: read only below pg_snapshot_xmin(pg_current_snapshot())."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    tenant_id: Mapped[str] = _tenant()
    type: Mapped[str]
    level: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]]
    attempt: Mapped[int]
    created_at: Mapped[datetime] = _now()
    xid: Mapped[int] = mapped_column(BigInteger, server_default=text("(pg_current_xact_id()::text::bigint)"))
    __table_args__ = (Index("events_tail", "tenant_id", "xid", "job_id", "seq"),)


class Step(Table):
    """One row per job and step: the numbers of the attempt whose step is in the weights."""

    __tablename__ = "steps"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    attempt: Mapped[int]
    epoch: Mapped[float]
    loss: Mapped[float]
    lr: Mapped[float]
    grad_norm: Mapped[float]
    tokens: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    created_at: Mapped[datetime] = _now()


class Checkpoint(Table):
    __tablename__ = "checkpoints"
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    tenant_id: Mapped[str] = _tenant()
    attempt: Mapped[int]
    step: Mapped[int] = mapped_column(BigInteger)
    prefix: Mapped[str]
    files: Mapped[dict[str, Any]]  # name → sha256
    metrics: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _now()
    __table_args__ = (UniqueConstraint("job_id", "attempt", "step"),)


class Lease(Table):
    """job, attempt, epoch, node → slots, turn, expiry, and the scheduler's order to give way. Closed leases stay as
    history; slots that are held stand in `lease_slots`. How long is summed over turns: see `app.db.usage`."""

    __tablename__ = "leases"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    slots: Mapped[list[int]] = mapped_column(ARRAY(Integer))
    kind: Mapped[str]
    epoch: Mapped[int] = mapped_column(BigInteger)
    turn: Mapped[int] = mapped_column(server_default="1")
    granted_at: Mapped[datetime] = _now()
    expires_at: Mapped[datetime]
    released_at: Mapped[datetime | None] = mapped_column(index=True)
    ordered: Mapped[str | None]  # park, suspend
    order_reason: Mapped[str | None]
    ordered_at: Mapped[datetime | None]
    parked_at: Mapped[datetime | None]
    held_since: Mapped[datetime | None] = mapped_column(server_default=func.now())  # None: parked, or released
    held_s: Mapped[float] = mapped_column(server_default="0")  # in turns that are over
    unbilled_s: Mapped[float] = mapped_column(server_default="0")  # of them, for switches that we caused
    price_per_hour: Mapped[float] = mapped_column(server_default="0")  # of one slot when it was granted, USD
    __table_args__ = (Index("leases_usage", "tenant_id", "released_at"),)


class LeaseSlot(Table):
    """The database itself refuses to hold one slot twice: a row per held slot, gone with its lease."""

    __tablename__ = "lease_slots"
    node: Mapped[str] = mapped_column(primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str]
    attempt: Mapped[int]
    __table_args__ = (
        ForeignKeyConstraint(
            ["job_id", "attempt", "node"], ["leases.job_id", "leases.attempt", "leases.node"], ondelete="CASCADE"
        ),
    )


class Node(Table):
    """What agents report; `lost_at` when the last scheduler round did not see it. `draining` is the operators' word."""

    __tablename__ = "nodes"
    name: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    slots: Mapped[int]
    memory_gb: Mapped[float]
    environments: Mapped[list[Any]]
    models: Mapped[list[Any]]
    seen_at: Mapped[datetime] = _now()
    lost_at: Mapped[datetime | None]
    market: Mapped[str] = mapped_column(server_default="on_demand")
    region: Mapped[str] = mapped_column(server_default="")
    price_per_hour: Mapped[float] = mapped_column(server_default="0")  # of one slot, USD
    park_gb: Mapped[float] = mapped_column(server_default="0")  # host memory for parked jobs
    draining: Mapped[bool] = mapped_column(server_default="false")
    notice_deadline: Mapped[datetime | None]  # the node goes then: a spot notice
    bf16: Mapped[bool] = mapped_column(server_default="false")  # its processors compute in it


class EnvironmentCheck(Table):
    """What the newest check of each kind has said of an environment on a node; see `cluster.ports.EnvironmentCheck`."""

    __tablename__ = "environment_checks"
    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    node: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    detail: Mapped[str] = mapped_column(server_default="")
    checked_at: Mapped[datetime]


class Model(Table):
    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    name: Mapped[str]
    last_version: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[datetime] = _now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (
        Index("models_name", "tenant_id", "name", unique=True, postgresql_where=text("deleted_at IS NULL")),
    )


class ModelVersion(Table):
    __tablename__ = "model_versions"
    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    tenant_id: Mapped[str] = _tenant()
    version: Mapped[int]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    kind: Mapped[str]  # adapter, model; files: what a script has made
    prefix: Mapped[str]
    files: Mapped[dict[str, Any]]  # name → sha256
    metrics: Mapped[dict[str, Any]]
    lineage: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _now()
    deleted_at: Mapped[datetime | None]
    __table_args__ = (UniqueConstraint("model_id", "version"),)


class ModelAlias(Table):
    """`name@prod`. Every promotion is a row; the newest one counts, `rollback` adds one that names the version
    before."""

    __tablename__ = "model_aliases"
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = _tenant()
    version_id: Mapped[str] = mapped_column(ForeignKey("model_versions.id"))
    created_at: Mapped[datetime] = _now()


class IdempotencyKey(Table):
    """Key and object are written in one transaction; a second insert of the same key waits for the first."""

    __tablename__ = "idempotency_keys"
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    token_sha256: Mapped[str]
    status: Mapped[int]
    response: Mapped[dict[str, Any]]
    delivered: Mapped[bool] = mapped_column(server_default="false")
    created_at: Mapped[datetime] = _now()


class IssuedToken(Table):
    """Tokens of the built-in issuer, so that they can be listed and revoked; never the token itself."""

    __tablename__ = "issued_tokens"
    jti: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str | None] = mapped_column(ForeignKey("tenants.id"), index=True)
    subject: Mapped[str]
    role: Mapped[str]
    scope: Mapped[str]
    created_at: Mapped[datetime] = _now()
    expires_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]


class Control(Table):
    """Small numbers with a compare-and-set: `scheduler_epoch`."""

    __tablename__ = "control"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)
