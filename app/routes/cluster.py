"""What there is and what waits; who asks; tokens of the built-in issuer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.deps import CallerDep, PageDep, Ref, ServicesDep
from app.routes.pages import paged
from app.schemas.common import Deleted, Page
from app.schemas.operators import NewToken

router = APIRouter(tags=["cluster"])


@router.get("/gpu-types")
def list_gpu_types(caller: CallerDep, services: ServicesDep) -> Page[dict[str, Any]]:
    """Every name that `gpu_type` may have, those that are here first."""
    return Page(data=services.cluster.gpu_types(caller), has_more=False)


@router.get("/nodes")
def list_nodes(caller: CallerDep, services: ServicesDep) -> Page[dict[str, Any]]:
    return Page(data=services.cluster.nodes(caller), has_more=False)


@router.get("/queue")
def list_queue(caller: CallerDep, services: ServicesDep) -> Page[dict[str, Any]]:
    """Waiting jobs in their order, why, and when they should start: the tenant's own, for operators all."""
    return Page(data=services.queue.queue(caller), has_more=False)


@router.get("/shares")
def list_shares(caller: CallerDep, services: ServicesDep) -> Page[dict[str, Any]]:
    """Slots held and wanted beside the fair share: the tenant's own and all others' together, for operators each tenant's."""
    return Page(data=services.queue.shares(caller), has_more=False)


@router.get("/limits")
def get_limits(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    return services.cluster.limits(caller)


@router.get("/me")
def get_me(caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    return services.cluster.me(caller)


@router.post("/tokens", status_code=201)
def create_token(new: NewToken, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """For admins (their tenant) and operators. The token is shown this once."""
    return services.tokens.create(caller, new)


@router.get("/tokens")
def list_tokens(caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    return paged(services.tokens.list(caller), page)


@router.delete("/tokens/{ref}")
def revoke_token(ref: Ref, caller: CallerDep, services: ServicesDep) -> Deleted:
    """It ends at once; jobs that it made go on."""
    return Deleted(id=services.tokens.revoke(caller, ref), object="token")
