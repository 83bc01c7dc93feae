"""/environments: from an environment.yml, as JSON {"spec"}, as YAML, or as a multipart file."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from app.deps import CallerDep, PageDep, Ref, RepeatDep, ServicesDep
from app.routes.spec import SPEC_BODY, spec_text
from app.schemas.common import Deleted, Name, Page, Text
from app.schemas.operators import EnvironmentChange
from app.services.environments import environment_view

router = APIRouter(prefix="/environments", tags=["environments"])


@router.post("", status_code=201, response_model=dict[str, Any], openapi_extra=SPEC_BODY)
def create_environment(
    caller: CallerDep, services: ServicesDep, repeat: RepeatDep, spec: Annotated[str, Depends(spec_text)]
) -> JSONResponse:
    """Solves it, so it takes seconds. The file's `name:` is the handle; again under a name: a new version."""
    made = services.environments.create(caller, spec, repeat)
    return JSONResponse(made, 201, {"location": f"/api/v1/environments/{made['id']}"})


@router.get("")
def list_environments(
    caller: CallerDep, services: ServicesDep, page: PageDep, name: Name | None = None
) -> Page[dict[str, Any]]:
    found = services.environments.page(caller, page, name)
    return Page(data=[environment_view(row, whole=False) for row in found.data], has_more=found.has_more)


@router.get("/{ref}")
def get_environment(
    ref: Ref,
    caller: CallerDep,
    services: ServicesDep,
    against: Annotated[
        Text | None, Query(max_length=200, description="Adds `diff`, from this one to that one.")
    ] = None,
) -> dict[str, Any]:
    return services.environments.get(caller, ref, against)


@router.post("/{ref}/update", status_code=201, response_model=dict[str, Any])
def update_environment(
    ref: Ref, change: EnvironmentChange, caller: CallerDep, services: ServicesDep, repeat: RepeatDep
) -> JSONResponse:
    """A new version; jobs keep the one that they have."""
    made = services.environments.update(caller, ref, change.model_dump(exclude_none=True), repeat)
    return JSONResponse(made, 201, {"location": f"/api/v1/environments/{made['id']}"})


@router.post("/{ref}/verify")
def verify_environment(ref: Ref, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Reads every file of it on every node that has it."""
    return services.environments.check(caller, ref, repair=False)


@router.post("/{ref}/repair")
def repair_environment(ref: Ref, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """As verify; what changed is put back, in all environments that share the files."""
    return services.environments.check(caller, ref, repair=True)


@router.delete("/{ref}")
def delete_environment(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    return Deleted(id=services.environments.delete(caller, ref), object="environment")
