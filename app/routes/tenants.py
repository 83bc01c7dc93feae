"""/tenants: shares and quotas, for operators."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from app.deps import CallerDep, PageDep, Ref, ServicesDep
from app.routes.pages import paged
from app.schemas.common import Page
from app.schemas.operators import TenantChange

router = APIRouter(prefix="/tenants", tags=["operators"])


@router.get("")
def list_tenants(caller: CallerDep, services: ServicesDep, page: PageDep) -> Page[dict[str, Any]]:
    """What each is entitled to, and what it uses of it."""
    return paged(services.tenants.list(caller), page)


@router.get("/{ref}")
def get_tenant(ref: Ref, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    return services.tenants.get(caller, ref)


@router.patch("/{ref}")
def change_tenant(ref: Ref, change: TenantChange, caller: CallerDep, services: ServicesDep) -> dict[str, Any]:
    """Fields that are left out stay; null sets the default."""
    return services.tenants.change(caller, ref, change)
