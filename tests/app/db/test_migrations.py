"""The migrated schema is the one of the models, and tenants see their own rows only."""

from __future__ import annotations

import uuid

import psycopg
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from builders_db import queued_job
from sqlalchemy import create_engine, func, make_url, select

from app.db.embedded import EmbeddedPostgres
from app.db.migrate import migrate
from app.db.models import Job, Table
from app.db.session import Database


def test_models_and_migrated_schema_agree(dsn: str) -> None:
    engine = create_engine(make_url(dsn).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(dsn: str) -> None:
    database = Database(dsn)
    job_id = queued_job(database)
    migrate(dsn)
    migrate(dsn)
    with database.platform() as session:
        assert session.scalars(select(Job.id)).all() == [job_id]
    database.close()


def test_an_owner_that_is_no_superuser_suffices(postgres_server: EmbeddedPostgres) -> None:
    """As production gives it: a database of its own, no right to make roles or to see through row-level security."""
    name = f"owner_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'x' IN ROLE heliostat_tenant".encode())
        admin.execute(f"CREATE DATABASE {name} OWNER {name}".encode())
    dsn = postgres_server.dsn(name).replace("//heliostat@", f"//{name}:x@")
    migrate(dsn)
    database = Database(dsn)
    job_id = queued_job(database)
    for tenant, expected in (("acme", [job_id]), ("rival", [])):
        with database.tenant(tenant) as session:
            assert session.scalars(select(Job.id)).all() == expected
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1
    database.close()
