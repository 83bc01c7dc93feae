"""/finetune: jobs, what happened to them, and what to do with them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from app.db.repository import PageRequest
from app.deps import CallerDep, JobId, PageDep, RepeatDep, ServicesDep
from app.schemas.common import Page
from app.schemas.finetune import Estimate, FinetuneRequest, Job, JobStatus, ResumeRequest
from cluster.errors import InvalidRequest

router = APIRouter(prefix="/finetune", tags=["jobs"])


@router.post("", status_code=202, response_model=Job)
def create_job(request: FinetuneRequest, caller: CallerDep, services: ServicesDep, repeat: RepeatDep) -> Response:
    """Accepts a job. It trains when its turn comes; follow it under its Location."""
    job = services.jobs.create(caller, request, repeat)
    return JSONResponse(job, 202, {"location": f"/api/v1/finetune/{job['id']}"})


@router.post("/estimate")
def estimate_job(request: FinetuneRequest, caller: CallerDep, services: ServicesDep) -> Estimate:
    """What the request would take; makes nothing."""
    return services.jobs.estimate(caller, request)


@router.get("", response_model=Page[Job] | Page[dict[str, Any]])
def list_jobs(
    caller: CallerDep,
    services: ServicesDep,
    page: PageDep,
    status: JobStatus | None = None,
    sort: Literal["created_at", "-created_at"] = "-created_at",
    fields: Annotated[str | None, Query(max_length=1000, description="Only these keys, separated by commas.")] = None,
) -> Any:
    wanted = _fields(fields)
    found = services.jobs.page(caller, PageRequest(page.after, page.limit, sort == "-created_at"), status)
    if wanted is None:
        return found
    return Page(data=[job.model_dump(mode="json", include=wanted) for job in found.data], has_more=found.has_more)


def _fields(fields: str | None) -> set[str] | None:
    if fields is None:
        return None
    wanted = {field.strip() for field in fields.split(",")} | {"id"}
    unknown = sorted(wanted - set(Job.model_fields))
    if unknown:
        raise InvalidRequest(
            f"a job has no field {unknown[0][:80]!r}",
            code="unknown_field",
            param="fields",
            hint=f"Fields: {', '.join(Job.model_fields)}.",
        )
    return wanted


@router.get("/{job_id}")
def get_job(job_id: JobId, caller: CallerDep, services: ServicesDep) -> Job:
    return services.jobs.get(caller, job_id)


@router.post("/{job_id}/cancel")
def cancel_job(job_id: JobId, caller: CallerDep, services: ServicesDep) -> Job:
    """Ends it; its checkpoints stay."""
    return services.jobs.cancel(caller, job_id)


@router.post("/{job_id}/pause")
def pause_job(job_id: JobId, caller: CallerDep, services: ServicesDep) -> Job:
    """Saves a checkpoint, then gives the slots back."""
    return services.jobs.pause(caller, job_id)


@router.post("/{job_id}/resume")
def resume_job(job_id: JobId, caller: CallerDep, services: ServicesDep, request: ResumeRequest | None = None) -> Job:
    """A paused job waits for its turn again; one that has used its budget needs a larger one in the body."""
    return services.jobs.resume(caller, job_id, request.budget if request is not None else None)


@router.post("/{job_id}/retry")
def retry_job(job_id: JobId, caller: CallerDep, services: ServicesDep) -> Job:
    """A failed job goes on from its last checkpoint."""
    return services.jobs.retry(caller, job_id)


@router.get("/{job_id}/explain")
def explain_job(job_id: JobId, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Why it waits and its place in the line, or what it holds; P50 and P80 of its start and its end."""
    return services.queue.explain(caller, job_id)
