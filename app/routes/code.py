"""/code: what jobs of method `custom` run: upload, look, delete."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.deps import CallerDep, PageDep, Ref, ServicesDep
from app.routes.upload import CODE_MULTIPART, MAX_CODE_BYTES, read_code
from app.schemas.code import Code
from app.schemas.common import Deleted, Name, Page
from app.services.code import view

router = APIRouter(prefix="/code", tags=["code"])


@router.post("", status_code=201, responses={200: {"model": Code}}, openapi_extra=CODE_MULTIPART)
async def upload_code(request: Request, response: Response, caller: CallerDep, services: ServicesDep) -> Code:
    """Streams a .tar.gz or .zip in. 200: the newest version of this name has the same files already."""
    services.code.may_create(caller)  # before anything is read
    async with read_code(request, min(services.max_upload_bytes, MAX_CODE_BYTES)) as upload:
        code, new = await run_in_threadpool(services.code.create, caller, upload)
    response.status_code = 201 if new else 200
    response.headers["location"] = f"/api/v1/code/{code.id}"
    return code


@router.get("")
def list_code(caller: CallerDep, services: ServicesDep, page: PageDep, name: Name | None = None) -> Page[Code]:
    found = services.code.page(caller, page, name)
    return Page(data=[view(row) for row in found.data], has_more=found.has_more)


@router.get("/{ref}")
def get_code(ref: Ref, caller: CallerDep, services: ServicesDep) -> Code:
    """With the names and hashes of its files."""
    return services.code.get(caller, ref)


@router.delete("/{ref}")
def delete_code(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    return Deleted(id=services.code.delete(caller, ref), object="code")
