"""/datasets: upload, look, delete."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app.deps import CallerDep, PageDep, Ref, ServicesDep
from app.routes.upload import MULTIPART, read_upload
from app.schemas.common import Deleted, Name, Page
from app.schemas.datasets import Dataset, DatasetPreview, DatasetReport
from app.services.datasets import view

router = APIRouter(prefix="/datasets", tags=["datasets"])


@router.post("", status_code=201, responses={200: {"model": Dataset}}, openapi_extra=MULTIPART)
async def upload_dataset(request: Request, response: Response, caller: CallerDep, services: ServicesDep) -> Dataset:
    """Streams a file in. 200: the newest version of this name has the same content already."""
    services.datasets.may_create(caller)  # before anything is read
    async with read_upload(request, services.max_upload_bytes) as upload:
        dataset, new = await run_in_threadpool(services.datasets.create, caller, upload)
    response.status_code = 201 if new else 200
    response.headers["location"] = f"/api/v1/datasets/{dataset.id}"
    return dataset


@router.get("")
def list_datasets(caller: CallerDep, services: ServicesDep, page: PageDep, name: Name | None = None) -> Page[Dataset]:
    found = services.datasets.page(caller, page, name)
    return Page(data=[view(row) for row in found.data], has_more=found.has_more)


@router.get("/{ref}")
def get_dataset(ref: Ref, caller: CallerDep, services: ServicesDep) -> Dataset:
    return services.datasets.get(caller, ref)


@router.get("/{ref}/report")
def get_dataset_report(ref: Ref, caller: CallerDep, services: ServicesDep) -> DatasetReport:
    return services.datasets.report(caller, ref)


@router.get("/{ref}/preview")
def preview_dataset(ref: Ref, caller: CallerDep, services: ServicesDep) -> DatasetPreview:
    """Three rows, and which of their text the model learns from."""
    return services.datasets.preview(caller, ref)


@router.delete("/{ref}")
def delete_dataset(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    return Deleted(id=services.datasets.delete(caller, ref), object="dataset")
