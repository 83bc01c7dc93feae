"""What a fresh data folder needs before anybody can ask for anything: tables, the tenant `default`, two tokens in 0600 files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from app.auth.issuer import Issuer, TokenRequest
from app.db.migrate import migrate
from app.db.session import Database, PoolSettings
from app.db.tenants import ensure_tenant
from app.settings import Settings
from cluster.errors import HeliostatError

DEFAULT_TENANT = "default"
LIFE_S = 365 * 86_400
RENEW_BEFORE_S = 30 * 86_400


def prepare_database(settings: Settings) -> None:
    """Idempotent. Raises `Unavailable`."""
    dsn = settings.database.dsn
    if dsn is None:
        raise HeliostatError("no database is configured", code="database_missing", hint="Set HELIOSTAT_DATABASE__DSN.")
    migrate(dsn)
    database = Database(dsn, PoolSettings(size=1))
    try:
        with database.platform() as session:
            ensure_tenant(session, DEFAULT_TENANT, settings.quota, settings.sandbox.uids)
        if settings.auth.builtin:
            issuer = Issuer(settings, database)
            _keep_token(issuer, token_file(settings, "default"), TokenRequest(DEFAULT_TENANT, "admin", None, LIFE_S))
            _keep_token(issuer, token_file(settings, "operator"), TokenRequest(None, "operator", None, LIFE_S))
    finally:
        database.close()


def token_file(settings: Settings, name: str) -> Path:
    return settings.data_dir / "keys" / f"{name}.token"


def _keep_token(issuer: Issuer, file: Path, request: TokenRequest) -> None:
    """A token that is there and lives long enough stays."""
    if file.exists() and time.time() - file.stat().st_mtime < LIFE_S - RENEW_BEFORE_S:
        return
    aside = file.with_suffix(".new")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as sink:
        sink.write(issuer.create(request).token + "\n")
    aside.replace(file)
