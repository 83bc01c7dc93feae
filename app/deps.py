"""What routes are given: the services, the caller, pages, and the key that makes a POST safe to repeat."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.db.repository import PageRequest
from app.schemas.common import Text
from app.services.access import Caller
from app.services.services import Services
from cluster.errors import Unauthorized

bearer = HTTPBearer(auto_error=False, description="A token of the issuer that Heliostat is set up with.")


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def caller(
    services: ServicesDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    tenant_id: Annotated[Text | None, Query(max_length=64, description="For operators: the tenant to act for.")] = None,
) -> Caller:
    """The value is the user: a route that asks for it is closed to everyone else."""
    if credentials is None:
        raise Unauthorized(
            "no token was sent", code="token_missing", hint="Send the header `Authorization: Bearer <token>`."
        )
    return services.identify(credentials.credentials, tenant_id)


CallerDep = Annotated[Caller, Depends(caller)]
Ref = Annotated[Text, Path(max_length=200, description="An id, a name or name@version.")]
JobId = Annotated[Text, Path(max_length=100)]


def page(
    after: Annotated[Text | None, Query(max_length=200, description="The id of the last object seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> PageRequest:
    return PageRequest(after, limit)


PageDep = Annotated[PageRequest, Depends(page)]
