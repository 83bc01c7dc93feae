"""/models and /base-models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from app.deps import CallerDep, PageDep, Ref, ServicesDep
from app.routes.pages import paged
from app.schemas.common import NAME_PATTERN, Deleted, Page
from app.schemas.operators import NewBaseModel, Promotion, Rollback
from app.services.models import check_alias

router = APIRouter(tags=["models"])
Output = Annotated[Literal["adapter", "merged", "gguf"] | None, Query()]
Alias = Annotated[str, Path(pattern=NAME_PATTERN)]
TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A tar of the files; its sha256 is in x-content-sha256.",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.get("/models")
def list_models(caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    data, more = services.models.page(caller, page)
    return Page(data=data, has_more=more)


@router.get("/models/{ref}")
def get_model(ref: Ref, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """A model, or with @version or @alias one version of it."""
    return services.models.get(caller, ref)


@router.get("/models/{ref}/versions")
def list_versions(ref: Ref, caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    data, more = services.models.versions(caller, ref, page)
    return Page(data=data, has_more=more)


@router.put("/models/{ref}/aliases/{alias}")
def promote_model(
    ref: Ref, alias: Alias, promotion: Promotion, caller: CallerDep, services: ServicesDep
) -> dict[str, Any]:
    """`ref@alias` means this version from now on."""
    return services.models.promote(caller, ref, check_alias(alias), promotion.version)


@router.post("/models/{ref}/rollback")
def rollback_model(ref: Ref, rollback: Rollback, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """`ref@alias` means again what it meant before."""
    return services.models.rollback(caller, ref, rollback.alias)


@router.get("/models/{ref}/download", response_class=Response, responses=TAR)
def download_model(ref: Ref, caller: CallerDep, services: ServicesDep, output: Output = None) -> Response:
    """The files of a version (the newest, unless `ref` names one) as a tar; `output`: of another form that it has."""
    download = services.models.download(caller, ref, output)
    headers = {
        "content-length": str(download.bytes),
        "content-disposition": f'attachment; filename="{download.filename}"',
        "x-content-sha256": download.sha256,
    }
    return StreamingResponse(download.archive.chunks(), media_type="application/x-tar", headers=headers)


@router.delete("/models/{ref}")
def delete_model(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    return Deleted(id=services.models.delete(caller, ref), object="model")


@router.get("/base-models")
def list_base_models(caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    return paged(services.base_models.list(caller), page)


@router.post("/base-models", status_code=202, response_model=dict[str, Any])
def add_base_model(new: NewBaseModel, caller: CallerDep, services: ServicesDep) -> JSONResponse:
    """For operators. It is converted meanwhile: look at its status."""
    made = services.base_models.add(caller, new)
    return JSONResponse(made, 202, {"location": f"/api/v1/base-models/{made['id']}"})


@router.get("/base-models/{ref}")
def get_base_model(ref: Ref, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    return services.base_models.get(caller, ref)


@router.delete("/base-models/{ref}")
def delete_base_model(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    return Deleted(id=services.base_models.remove(caller, ref), object="base_model")
