"""What happened: events of a job or of the tenant, logs, metrics, checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.deps import CallerDep, JobId, PageDep, ServicesDep
from app.routes.streams import STREAM, LastEventId, stream, wants_stream
from app.schemas.common import Page
from app.services.events import LogPlace, checkpoint_view, sequence

router = APIRouter(tags=["events"])


@router.get("/finetune/{job_id}/events", response_model=Page[dict[str, Any]], responses=STREAM)
async def job_events(
    request: Request,
    job_id: JobId,
    caller: CallerDep,
    services: ServicesDep,
    page: PageDep,
    last_event_id: LastEventId = None,
) -> Response:
    """In the order of their numbers. With `Accept: text/event-stream` they are followed until the job has ended."""
    if wants_stream(request):
        return stream(await services.events.follow(caller, job_id, last_event_id))
    data, more = await run_in_threadpool(services.events.page, caller, job_id, page.after, page.limit)
    return JSONResponse({"object": "list", "data": data, "has_more": more})


@router.get("/events", responses=STREAM)
async def tenant_events(caller: CallerDep, services: ServicesDep, last_event_id: LastEventId = None) -> Response:
    """Everything of the tenant, as server-sent events, from now on or after Last-Event-ID."""
    return stream(await services.events.follow_tenant(caller, last_event_id))


LOG: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The log as text, or its lines as server-sent events.",
        "content": {
            "text/plain": {"schema": {"type": "string"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}


@router.get("/finetune/{job_id}/logs", response_class=Response, responses=LOG)
async def job_logs(
    request: Request,
    job_id: JobId,
    caller: CallerDep,
    services: ServicesDep,
    last_event_id: LastEventId = None,
    attempt: Annotated[int | None, Query(ge=1, le=10**9, description="Left out: the last that wrote.")] = None,
    rank: Annotated[int, Query(ge=0, le=10**9)] = 0,
    tail: Annotated[int | None, Query(ge=0, le=100_000, description="Only the last lines.")] = None,
    offset: Annotated[int, Query(ge=0, le=2**62, description="From this byte on; see x-log-next-offset.")] = 0,
    follow: bool = False,
) -> Response:
    """What the training printed. `follow=true` or `Accept: text/event-stream`: line by line until the attempt ends."""
    if follow or wants_stream(request):
        place = LogPlace(job_id, attempt, rank, sequence(last_event_id) or offset, None if last_event_id else tail)
        return stream(await services.events.follow_log(caller, place))
    log, number, begin = await run_in_threadpool(
        services.events.log, caller, LogPlace(job_id, attempt, rank, offset, tail)
    )
    headers = {"x-log-attempt": str(number), "x-log-rank": str(rank), "x-log-next-offset": str(log.size)}
    return StreamingResponse(log.read(begin), media_type="text/plain; charset=utf-8", headers=headers)


@router.get("/finetune/{job_id}/metrics")
def job_metrics(
    job_id: JobId, caller: CallerDep, services: ServicesDep, points: Annotated[int, Query(ge=2, le=10_000)] = 500
) -> dict[str, Any]:
    """Steps, down-sampled to `points`, and all evaluations."""
    return services.events.metrics(caller, job_id, points)


@router.get("/finetune/{job_id}/checkpoints")
def job_checkpoints(job_id: JobId, caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    found = services.events.checkpoints(caller, job_id, page)
    return Page(data=[checkpoint_view(row) for row in found.data], has_more=found.has_more)
