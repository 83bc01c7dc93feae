"""Jobs: what a tenant may ask of them. A job is a row; who trains it reads rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from app.db import ids
from app.db.events import NewEvent, append_event
from app.db.models import Dataset, ModelVersion, Tenant
from app.db.models import Job as JobRow
from app.db.repository import PageRequest, Repository
from app.db.requests import idempotent
from app.db.transitions import Change, ask, resume, retry, transition
from app.schemas.common import Page
from app.schemas.finetune import Estimate, FinetuneRequest, Job
from app.services.access import Access, Caller, Repeat
from app.services.job_plan import Plan, make_plan
from app.services.job_view import read_around, states_of, view
from app.services.parts import Parts, SolvedEnvironment
from app.services.queue import positions
from cluster.core.job import ACTIVE, TERMINAL, JobState, Wish
from cluster.errors import Conflict, QuotaExceeded

DEFAULT_ENVIRONMENT = "name: default\n"


class JobService:
    def __init__(self, parts: Parts, access: Access) -> None:
        self._parts = parts
        self._access = access
        self._default: SolvedEnvironment | None = None

    def create(self, caller: Caller, request: FinetuneRequest, repeat: Repeat) -> dict[str, Any]:
        """Row, lock, first events and idempotency key in one transaction. The job object, as JSON."""
        caller = self._access.known(caller.for_tenant(request.tenant_id))
        tenant = caller.may("model:train", request.base_model)
        if request.priority in ("urgent", "high"):
            caller.may("model:urgent")
        default = self._default_environment()
        with self._parts.database.tenant(tenant) as session, idempotent(session, repeat.by(tenant)) as once:
            if once.replay is None:
                job = self._create(session, caller, request, default)
                once.answer(202, self._views(session, [job], {})[0].model_dump(mode="json"))
            assert once.response is not None  # a replay brings its own
            return once.response

    def _create(self, session: Session, caller: Caller, request: FinetuneRequest, default: SolvedEnvironment) -> JobRow:
        plan = make_plan(session, caller.tenant, request, self._parts.settings)
        _check_quota(session, caller.tenant, plan)
        job = _row(caller, request, plan)
        environment = plan.environment or default
        job.lock, job.fingerprint = environment.lock, environment.fingerprint
        session.add(job)
        session.flush()
        append_event(session, job.id, NewEvent("created", "the request was accepted", data={"request": job.request}))
        for warning in plan.warnings:
            append_event(session, job.id, NewEvent("warning", warning, "warn"))
        transition(session, job, Change(JobState.QUEUED, "waits for its turn"))
        session.flush()
        session.refresh(job)
        return job

    def estimate(self, caller: Caller, request: FinetuneRequest) -> Estimate:
        """The same checks as `create`; nothing is written."""
        caller = self._access.known(caller.for_tenant(request.tenant_id))
        tenant = caller.may("model:train", request.base_model)
        with self._parts.database.tenant(tenant) as session:
            plan = make_plan(session, tenant, request, self._parts.settings)
        return Estimate(
            base_model=plan.base.name,
            dataset_id=plan.dataset.id,
            method=plan.method,
            training_type=plan.training_type,
            hyperparams=plan.hyperparams_dict(),
            shape=plan.shape_dict(),
            estimate=plan.estimate(),
            warnings=plan.warnings,
        )

    def page(self, caller: Caller, request: PageRequest, status: str | None) -> Page[Job]:
        tenant = caller.may("model:read")
        conditions = () if status is None else (JobRow.state.in_(states_of(status)),)
        places = self._positions()
        with self._parts.database.tenant(tenant) as session:
            found = Repository(session, tenant).page(JobRow, request, *conditions)
            return Page(data=self._views(session, list(found.data), places), has_more=found.has_more)

    def get(self, caller: Caller, job_id: str) -> Job:
        tenant = caller.may("model:read", job_id)
        places = self._positions()
        with self._parts.database.tenant(tenant) as session:
            return self._views(session, [Repository(session, tenant).job(job_id)], places)[0]

    def cancel(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, lambda session, job: ask(session, job, Wish.CANCEL))

    def pause(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, lambda session, job: ask(session, job, Wish.PAUSE))

    def resume(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, resume)

    def retry(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, _retry)

    def _act(self, caller: Caller, job_id: str, act: Callable[[Session, JobRow], None]) -> Job:
        tenant = caller.may("model:train", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id, lock=True)
            act(session, job)
            session.flush()
            session.refresh(job)
            return self._views(session, [job], {})[0]

    def _positions(self) -> dict[str, int]:
        # Over all tenants: a place in the line, never whose jobs stand before it.
        with self._parts.database.platform() as session:
            return positions(session)

    def _views(self, session: Session, jobs: list[JobRow], places: dict[str, int]) -> list[Job]:
        around = read_around(session, jobs, places)
        now = session.scalars(select(func.clock_timestamp())).one()
        return [view(job, around, now) for job in jobs]

    def _default_environment(self) -> SolvedEnvironment:
        if self._default is None:
            self._default = self._parts.solve(DEFAULT_ENVIRONMENT)
        return self._default


def _retry(session: Session, job: JobRow) -> None:
    """Its inputs must still be there, and stay until the job is seen to need them."""
    shared = {"read": True}
    for dataset_id in (job.dataset_id, job.validation_dataset_id):
        dataset = session.get(Dataset, dataset_id, with_for_update=shared) if dataset_id else None
        if dataset is not None and dataset.deleted_at is not None:
            raise Conflict(
                f"dataset {dataset.name}@{dataset.version} of this job was deleted",
                code="dataset_deleted",
                hint="Send a new request with another dataset.",
            )
    parent = session.get(ModelVersion, job.parent_version_id, with_for_update=shared) if job.parent_version_id else None
    if parent is not None and parent.deleted_at is not None:
        raise Conflict(
            "the tuned model that this job continues from was deleted",
            code="model_deleted",
            hint="Send a new request with another base_model.",
        )
    retry(session, job)


def _check_quota(session: Session, tenant: str, plan: Plan) -> None:
    """Raises `QuotaExceeded`. Creations of one tenant go one after another, so that two cannot take the last place."""
    session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))"), {"what": f"jobs {tenant}"})
    quota = session.get_one(Tenant, tenant)
    slots = plan.choice.shape.slots
    if quota.max_slots is not None and slots > quota.max_slots:
        raise QuotaExceeded(
            f"the job needs {slots} slots, the tenant may hold {quota.max_slots}",
            code="quota_exceeded",
            param="resource_config.num_gpus",
            hint="Ask for fewer GPUs, or ask an operator for a larger quota.",
        )
    idle = [str(state) for state in JobState if state not in TERMINAL | ACTIVE]
    waiting = session.scalars(select(func.count()).where(JobRow.tenant_id == tenant, JobRow.state.in_(idle))).one()
    if waiting >= quota.max_queued_jobs:
        raise QuotaExceeded(
            f"{waiting} jobs wait already, the tenant may have {quota.max_queued_jobs}",
            code="quota_exceeded",
            hint="Wait until some have started, cancel some, or ask an operator for a larger quota.",
        )


def _row(caller: Caller, request: FinetuneRequest, plan: Plan) -> JobRow:
    hours = request.resource_config.max_runtime_hours
    return JobRow(
        id=ids.new_id(ids.JOB),
        tenant_id=caller.tenant,
        state=JobState.VALIDATING,
        priority=request.priority,
        request=request.model_dump(mode="json", exclude_unset=True),
        method=plan.method,
        training_type=plan.training_type,
        task=request.task,
        hyperparams=asdict(plan.hyperparams),
        precision="auto",
        resource_config=request.resource_config.model_dump(mode="json", exclude_none=True),
        shape=plan.shape_dict(),
        estimate=plan.estimate(),
        base_model_id=plan.base.id,
        parent_version_id=plan.parent.id if plan.parent else None,
        dataset_id=plan.dataset.id,
        validation_dataset_id=plan.validation.id if plan.validation else None,
        environment_id=plan.environment.id if plan.environment else None,
        output_model=_output_name(request, plan),
        user_metadata=request.metadata or {},
        created_by=caller.identity.subject,
        max_runtime_s=hours * 3600 if hours else None,
    )


def _output_name(request: FinetuneRequest, plan: Plan) -> str:
    """`output_model`, else the suffix, else `<base>-ft`; always a name that can be referred to."""
    return request.output_model or (request.suffix or f"{plan.base.name[:61]}-ft").lower()
