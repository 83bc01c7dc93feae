"""The database of any process."""

from __future__ import annotations

from app.db.session import Database, PoolSettings
from app.settings import Settings
from cluster.errors import HeliostatError


def database(settings: Settings, *, statement_timeout_s: float | None = None, size: int | None = None) -> Database:
    if settings.database.dsn is None:
        raise HeliostatError(
            "no database is configured for this process",
            code="database_missing",
            hint="Processes are started by `heliostat up`, or name a server: HELIOSTAT_DATABASE__DSN.",
        )
    pool = PoolSettings(size=size or settings.database.pool_size, statement_timeout_s=statement_timeout_s)
    return Database(settings.database.dsn, pool)
