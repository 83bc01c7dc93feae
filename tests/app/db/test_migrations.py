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
from app.db.models import Job, Lease, Node, Table, Tenant
from app.db.session import Database
from app.db.shapes import shapes_from_json
from cluster.core.job import Shape


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


FILLED = """
INSERT INTO tenants (id, max_queued_jobs) VALUES ('acme', 5), ('rival', 7);
INSERT INTO base_models (id, name, status, source) VALUES ('base-1', 'tiny', 'ready', '/x');
INSERT INTO datasets (id, tenant_id, name, version, format, task, rows, bytes, sha256, source_sha256, object_key, report, max_chars)
    VALUES ('file-1', 'acme', 'rows', 1, 'text', 'causal_lm', 8, 80, 'd', 'e', 'k', '{}', 9);
INSERT INTO jobs (id, tenant_id, state, attempt, priority, request, method, training_type, task, hyperparams, precision,
                  resource_config, shape, estimate, base_model_id, dataset_id, lock, fingerprint, output_model, metadata, created_by)
    SELECT 'ftjob-' || n, 'acme', CASE n WHEN 1 THEN 'running' ELSE 'queued' END, 2, 'normal', '{}', 'sft', 'lora', 'causal_lm',
           '{}', 'auto', '{}', '{"slots": 2, "memory_gb": 1.5, "kinds": ["cpu"], "nodes": 1}', '{}', 'base-1', 'file-1', '{}', 'f',
           'out', '{}', 'me' FROM generate_series(1, 2) AS n;
INSERT INTO leases (job_id, attempt, node, tenant_id, slots, kind, epoch, granted_at, expires_at, released_at) VALUES
    ('ftjob-1', 1, 'n1', 'acme', '{0,1}', 'cpu', 1, now() - interval '3 hours', now(), now() - interval '1 hour'),
    ('ftjob-1', 2, 'n1', 'acme', '{0,1}', 'cpu', 1, now() - interval '1 hour', now(), NULL);
INSERT INTO lease_slots (node, slot, job_id, attempt) VALUES ('n1', 0, 'ftjob-1', 2), ('n1', 1, 'ftjob-1', 2);
INSERT INTO nodes (name, kind, slots, memory_gb, environments, models) VALUES ('n1', 'cpu', 2, 4, '[]', '[]');
"""


def test_a_filled_database_of_the_first_version_moves_up(postgres_server: EmbeddedPostgres) -> None:
    name = f"filled_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_server.dsn("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    dsn = postgres_server.dsn(name)
    migrate(dsn, "0001")
    with psycopg.connect(dsn) as first:
        first.execute(FILLED.encode())
    migrate(dsn)
    database = Database(dsn)
    with database.platform() as session:
        closed, running = session.scalars(select(Lease).order_by(Lease.attempt)).all()
        assert (closed.held_s, closed.held_since) == (7200.0, None)
        assert (running.held_s, running.held_since) == (0.0, running.granted_at)
        first_job, second = session.scalars(select(Job).order_by(Job.id)).all()
        assert (first_job.attained_s, first_job.turns, first_job.budget) == (7200.0, 2, None)
        assert (second.attained_s, second.turns, second.moved) == (0.0, 0, False)
        assert shapes_from_json(second.shape) == (Shape(2, 1.5, ("cpu",)),)
        tenant, node = session.get_one(Tenant, "acme"), session.get_one(Node, "n1")
        assert (tenant.weight, tenant.guaranteed_slots, tenant.urgent_slots, tenant.max_queued_jobs) == (
            1.0,
            0,
            None,
            5,
        )
        assert (node.market, node.region, node.price_per_hour, node.draining, node.bf16) == (
            "on_demand",
            "",
            0.0,
            False,
            False,
        )
    for who, jobs, leases in (("acme", 2, 2), ("rival", 0, 0)):
        with database.tenant(who) as session:
            assert session.scalar(select(func.count()).select_from(Job)) == jobs
            assert session.scalar(select(func.count()).select_from(Lease)) == leases
            assert session.scalars(select(Tenant.id)).all() == [who]
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
