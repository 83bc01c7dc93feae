"""The migrated schema is the one of the models, and tenants see their own rows only."""

from __future__ import annotations

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url

from app.db.migrate import migrate
from app.db.models import Table


def test_models_and_migrated_schema_agree(dsn: str) -> None:
    engine = create_engine(make_url(dsn).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(dsn: str) -> None:
    migrate(dsn)
    migrate(dsn)
