"""Of an API replica."""

from __future__ import annotations

from functools import partial

from fastapi import FastAPI

from app.auth.issuer import Issuer
from app.auth.verify import make_verifier
from app.main import AppParts, create_app
from app.settings import load_settings
from app.wiring.database import database
from app.wiring.environments import solve_environment
from cluster.client import check_environment
from cluster.storage.objects import ObjectStore

HTTP_STATEMENT_TIMEOUT_S = 30.0


def http_app() -> FastAPI:
    settings = load_settings()
    rows = database(settings, statement_timeout_s=HTTP_STATEMENT_TIMEOUT_S)
    parts = AppParts(
        settings=settings,
        database=rows,
        storage=ObjectStore(settings.objects_url),
        solve=partial(solve_environment, settings),
        check_environment=check_environment,
        verifier=make_verifier(settings, rows),
        issuer=Issuer(settings, rows) if settings.auth.builtin else None,
    )
    return create_app(parts, under_serve=True)
