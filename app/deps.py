"""What routes are given: the services, the caller, pages, and what makes a POST safe to repeat."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

import orjson
from fastapi import Depends, Header, Path, Query, Request, params
from fastapi.dependencies.utils import get_flat_params
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from app.db.repository import PageRequest
from app.schemas.common import Text, did_you_mean
from app.services.access import Caller, Repeat
from app.services.services import Services
from cluster.errors import InvalidRequest, Unauthorized

bearer = HTTPBearer(auto_error=False, description="A token of the issuer that Heliostat is set up with.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


def services(request: Request) -> Services:
    found: Services = request.app.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def caller(
    services: ServicesDep,
    credentials: Credentials,
    tenant_id: Annotated[Text | None, Query(max_length=64, description="For operators: the tenant to act for.")] = None,
) -> Caller:
    """The value is the user: a route that asks for it is closed to everyone else."""
    if credentials is None:
        raise Unauthorized(
            "no token was sent", code="token_missing", hint="Send the header `Authorization: Bearer <token>`."
        )
    return services.identify(credentials.credentials, tenant_id)


CallerDep = Annotated[Caller, Depends(caller)]


def known_parameters(request: Request) -> None:
    """A misspelt filter must not answer with everything. Raises `InvalidRequest`."""
    route: APIRoute = request.scope["route"]
    known = {one.alias for one in get_flat_params(route.dependant) if isinstance(one.field_info, params.Query)}
    unknown = next((name for name in request.query_params if name not in known), None)
    if unknown is not None:
        hint = did_you_mean(unknown, sorted(known))
        raise InvalidRequest(
            "there is no such query parameter here", code="unknown_field", param=unknown[:100], hint=hint
        )


Ref = Annotated[Text, Path(max_length=200, description="An id, a name or name@version.")]
JobId = Annotated[Text, Path(max_length=100)]


def page(
    after: Annotated[Text | None, Query(max_length=200, description="The id of the last object seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> PageRequest:
    return PageRequest(after, limit)


PageDep = Annotated[PageRequest, Depends(page)]


async def repeat(
    request: Request,
    credentials: Credentials,
    idempotency_key: Annotated[
        str | None, Header(description="The same key within 24 h gets the first answer; nothing is made twice.")
    ] = None,
) -> Repeat:
    token = credentials.credentials if credentials is not None else ""
    token_id = hashlib.sha256(token.encode()).hexdigest()
    return Repeat(request.url.path, idempotency_key, _parsed(await request.body()), token_id)


def _parsed(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", errors="replace")  # no JSON: the text itself tells two requests apart


RepeatDep = Annotated[Repeat, Depends(repeat)]
