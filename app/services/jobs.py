"""Jobs: what a tenant may ask of them. A job is a row; who trains it reads rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.db import ids
from app.db.events import NewEvent, append_event
from app.db.models import Code, Dataset, ModelVersion
from app.db.models import Job as JobRow
from app.db.repository import PageRequest, Repository
from app.db.requests import idempotent
from app.db.transitions import Change, ask, resume, retry, transition
from app.db.usage import budget_spent
from app.schemas.common import Page
from app.schemas.finetune import Budget, Estimate, FinetuneRequest, Job
from app.services.access import Access, Caller, Repeat
from app.services.job_plan import Plan, make_plan
from app.services.job_view import Ahead, read_around, states_of, view
from app.services.line import LineService
from app.services.parts import Parts, SolvedEnvironment
from app.services.quota import check_queue, priority_warnings, within_slots
from cluster.core.job import JobState, Wish
from cluster.errors import Conflict

DEFAULT_ENVIRONMENT = "name: default\n"


class JobService:
    def __init__(self, parts: Parts, access: Access, line: LineService) -> None:
        self._parts = parts
        self._access = access
        self._line = line
        self._default: SolvedEnvironment | None = None
        self._solving = threading.Lock()

    def create(self, caller: Caller, request: FinetuneRequest, repeat: Repeat) -> dict[str, Any]:
        """Row, lock, first events and idempotency key in one transaction. The job object, as JSON."""
        caller = self._access.known(caller.for_tenant(request.tenant_id))
        tenant = caller.may("model:train", request.base_model)
        _may_hurry(caller, request)
        default = self._default_environment()
        with self._parts.database.tenant(tenant) as session, idempotent(session, repeat.by(tenant)) as once:
            if once.replay is None:
                job = self._create(session, caller, request, default)
                once.answer(202, self._views(session, [job])[0].model_dump(mode="json"))
            assert once.response is not None  # a replay brings its own
            return once.response

    def _create(self, session: Session, caller: Caller, request: FinetuneRequest, default: SolvedEnvironment) -> JobRow:
        plan = make_plan(session, caller.tenant, request, self._parts.settings)
        quota = check_queue(session, caller.tenant)
        plan = replace(plan, choice=within_slots(plan.choice, quota))
        job = _row(caller, request, plan)
        environment = plan.environment or default
        job.lock, job.fingerprint = environment.lock, environment.fingerprint
        session.add(job)
        session.flush()
        append_event(session, job.id, NewEvent("created", "the request was accepted", data={"request": job.request}))
        for warning in [*plan.warnings, *priority_warnings(plan.choice, quota, request.priority)]:
            append_event(session, job.id, NewEvent("warning", warning, "warn"))
        transition(session, job, Change(JobState.QUEUED, "waits for its turn"))
        session.flush()
        session.refresh(job)
        return job

    def estimate(self, caller: Caller, request: FinetuneRequest) -> Estimate:
        """The same checks as `create`; nothing is written."""
        caller = self._access.known(caller.for_tenant(request.tenant_id))
        tenant = caller.may("model:train", request.base_model)
        _may_hurry(caller, request)
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
        ahead = self._ahead()
        with self._parts.database.tenant(tenant) as session:
            found = Repository(session, tenant).page(JobRow, request, *conditions)
            return Page(data=self._views(session, list(found.data), ahead), has_more=found.has_more)

    def get(self, caller: Caller, job_id: str) -> Job:
        tenant = caller.may("model:read", job_id)
        ahead = self._ahead()
        with self._parts.database.tenant(tenant) as session:
            return self._views(session, [Repository(session, tenant).job(job_id)], ahead)[0]

    def cancel(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, lambda session, job: ask(session, job, Wish.CANCEL))

    def pause(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, lambda session, job: ask(session, job, Wish.PAUSE))

    def resume(self, caller: Caller, job_id: str, budget: Budget | None = None) -> Job:
        """`budget` replaces what it names of the job's."""
        return self._act(caller, job_id, lambda session, job: _resume(session, job, budget))

    def retry(self, caller: Caller, job_id: str) -> Job:
        return self._act(caller, job_id, _retry)

    def _act(self, caller: Caller, job_id: str, act: Callable[[Session, JobRow], None]) -> Job:
        tenant = caller.may("model:train", job_id)
        with self._parts.database.tenant(tenant) as session:
            job = Repository(session, tenant).job(job_id, lock=True)
            act(session, job)
            session.flush()
            session.refresh(job)
            return self._views(session, [job])[0]

    def _ahead(self) -> Ahead:
        # Over all tenants: a place in the line, never whose jobs stand before it.
        return Ahead(self._line.look().positions(), self._line.forecast())

    def _views(self, session: Session, jobs: list[JobRow], ahead: Ahead | None = None) -> list[Job]:
        around = read_around(session, jobs)
        now = session.scalars(select(func.clock_timestamp())).one()
        return [view(job, around, ahead or Ahead(), now) for job in jobs]

    def _default_environment(self) -> SolvedEnvironment:
        with self._solving:  # once; many at the same time would also meet a fault of CPython 3.11's parser
            if self._default is None:
                self._default = self._parts.solve(DEFAULT_ENVIRONMENT)
            return self._default


def _may_hurry(caller: Caller, request: FinetuneRequest) -> None:
    if request.priority in ("urgent", "high"):
        caller.may("model:urgent")


def _resume(session: Session, job: JobRow, budget: Budget | None) -> None:
    """Raises `Conflict` when what the budget still says is spent, `QuotaExceeded`."""
    if budget is not None:
        job.budget = {**(job.budget or {}), **budget.model_dump(exclude_none=True)}
        append_event(session, job.id, NewEvent("budget", "the budget was set anew", data={"budget": job.budget}))
    if job.state == JobState.PAUSED:
        check_queue(session, job.tenant_id)
        spent = budget_spent(session, job)
        if spent is not None:
            raise Conflict(
                f"the job has used its budget of {spent}",
                code="budget_reached",
                param="budget",
                hint='Give a larger one: {"budget": {"gpu_hours": …}}, or `heliostat jobs resume ID --gpu-hours N`.',
            )
    resume(session, job)


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
    code = session.get(Code, job.code_id, with_for_update=shared) if job.code_id else None
    if code is not None and code.deleted_at is not None:
        raise Conflict(
            f"code {code.name}@{code.version} of this job was deleted",
            code="code_deleted",
            hint="Upload it again, and send a new request.",
        )
    parent = session.get(ModelVersion, job.parent_version_id, with_for_update=shared) if job.parent_version_id else None
    if parent is not None and parent.deleted_at is not None:
        raise Conflict(
            "the tuned model that this job continues from was deleted",
            code="model_deleted",
            hint="Send a new request with another base_model.",
        )
    if job.state == JobState.FAILED:
        _check_runtime(job)
        check_queue(session, job.tenant_id)
    retry(session, job)


def _check_runtime(job: JobRow) -> None:
    if job.max_runtime_s is not None and job.ran_s >= job.max_runtime_s:
        raise Conflict(
            f"the job has run for all of its {job.max_runtime_s / 3600:g} max_runtime_hours",
            code="max_runtime_reached",
            param="resource_config.max_runtime_hours",
            hint="Send a new request with a longer max_runtime_hours.",
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
        hyperparams=plan.hyperparams_dict(),
        precision="auto",
        resource_config=request.resource_config.model_dump(mode="json", exclude_none=True),
        shape=plan.shape_dict(),
        estimate=plan.estimate(),
        base_model_id=plan.base.id,
        parent_version_id=plan.parent.id if plan.parent else None,
        parent_checkpoint_id=plan.checkpoint.id if plan.checkpoint else None,
        dataset_id=plan.dataset.id,
        validation_dataset_id=plan.validation.id if plan.validation else None,
        environment_id=plan.environment.id if plan.environment else None,
        code_id=plan.script.code.id if plan.script and plan.script.code else None,
        script=plan.script.as_row() if plan.script else None,
        output_model=_output_name(request, plan),
        user_metadata=request.metadata or {},
        created_by=caller.identity.subject,
        max_runtime_s=hours * 3600 if hours else None,
        budget=request.budget.model_dump(exclude_none=True) if request.budget else None,
    )


def _output_name(request: FinetuneRequest, plan: Plan) -> str:
    """`output_model`, else the suffix, else `<base>-ft`; always a name that can be referred to."""
    return request.output_model or (request.suffix or f"{plan.base.name[:61]}-ft").lower()
