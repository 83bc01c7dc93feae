"""Makes the HTTP application from its parts. Knows no Ray: what it changes are rows, and others act on them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI

from app import errors
from app.auth.issuer import Issuer
from app.db.session import Database
from app.deps import known_parameters
from app.middleware import RequestContext
from app.routes import bundles, cluster, code, datasets, environments, events, finetune, health, models, tenants
from app.schemas.common import ErrorBody
from app.services.changes import Changes
from app.services.parts import CheckEnvironment, Parts, SolvedEnvironment
from app.services.services import Services, Verifier
from app.settings import Settings
from cluster.storage.objects import ObjectStore
from runtime_envs.lock import solve

API = "/api/v1"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 405, 409, 413, 415, 422, 429, 500, 503)
}


@dataclass(frozen=True)
class AppParts:
    """`issuer` None: tokens come from elsewhere. `solve`: environment.yml → lock. `check_environment`: asks the nodes; without
    any there is none that has it."""

    settings: Settings
    database: Database
    storage: ObjectStore
    verifier: Verifier
    issuer: Issuer | None = None
    solve: Callable[[str], SolvedEnvironment] = field(default=solve)
    check_environment: CheckEnvironment = field(default=lambda fingerprint, repair: {})


def create_app(parts: AppParts, *, under_serve: bool = False) -> FastAPI:
    """`under_serve`: Ray Serve answers with the request's id itself."""
    app = FastAPI(title="Heliostat", version="1", lifespan=_lifespan, responses=ERRORS)
    app.state.services = make_services(parts)
    app.add_middleware(
        RequestContext,
        max_body_bytes=parts.settings.http.max_body_bytes,
        uploads=frozenset(
            f"{API}{path}" for path in (datasets.router.prefix, code.router.prefix, f"{bundles.router.prefix}/import")
        ),
        id_is_sent_outside=under_serve,
    )
    errors.install(app)
    api = APIRouter(prefix=API, dependencies=[Depends(known_parameters)])
    for module in (events, finetune, datasets, code, bundles, environments, models, cluster, tenants):
        api.include_router(module.router)
    app.include_router(api)
    app.include_router(health.router)
    return app


def make_services(parts: AppParts) -> Services:
    changes = Changes(parts.database.dsn)
    inside = Parts(parts.settings, parts.database, parts.storage, changes, parts.solve, parts.check_environment)
    return Services(inside, parts.verifier, parts.issuer)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.services.close()
