"""Bundles of environments: out as a .tar.gz, in as a multipart file."""

from __future__ import annotations

import shutil
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from app.deps import CallerDep, Ref, ServicesDep
from app.routes.upload import BUNDLE_MULTIPART, read_bundle

router = APIRouter(prefix="/environments", tags=["environments"])
PACKED = "application/gzip"


@router.get("/{ref}/bundle", response_class=FileResponse, responses={200: {"content": {PACKED: {}}}})
def export_environment(
    ref: Ref,
    caller: CallerDep,
    services: ServicesDep,
    self_contained: Annotated[
        bool, Query(description="With the packages of the base, so that no channel is needed.")
    ] = False,
) -> FileResponse:
    """A signed .tar.gz: lock, packages that the base lacks, and `environment.yml` and `explicit.txt` for stock conda. Takes
    seconds to minutes."""
    bundle = services.bundles.export(caller, ref, whole=self_contained)
    cleanup = BackgroundTask(shutil.rmtree, bundle.parent, ignore_errors=True)
    return FileResponse(bundle, media_type=PACKED, filename=bundle.name, background=cleanup)


@router.post("/import", status_code=201, openapi_extra=BUNDLE_MULTIPART)
async def import_environment(
    request: Request, response: Response, caller: CallerDep, services: ServicesDep
) -> dict[str, Any]:
    """From a bundle that this Heliostat has signed, or another one that an operator trusts (`signed_by` says which). All of it
    is checked before anything is kept."""
    services.bundles.may_import(caller)  # before anything is read
    async with read_bundle(request, services.bundles.max_bytes) as sent:
        made = await run_in_threadpool(services.bundles.create, caller, sent.file)
    response.headers["location"] = f"/api/v1/environments/{made['id']}"
    return made
