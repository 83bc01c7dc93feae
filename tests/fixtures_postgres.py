"""A real PostgreSQL for tests: one server a session, one fresh migrated database a test (copied from a template:
fast)."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from app.db.embedded import EmbeddedPostgres
from app.db.migrate import migrate
from app.db.session import Database, PoolSettings

TEMPLATE = "template_heliostat"
UNSAFE_BUT_FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_wal_size": "64MB",
    # Its transactions are open ones too: a reader of events waits for them.
    "autovacuum": "off",
}
PATIENT = PoolSettings(wait_s=60.0, connect_timeout_s=60)
"""A machine that stands still for some seconds is no database that is down."""
MEMORY = Path("/dev/shm")
ROOM_BYTES = 2 << 30


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    folder = Path(tempfile.mkdtemp(prefix="heliostat-tests-", dir=_memory()))
    server = EmbeddedPostgres(folder / "pg", UNSAFE_BUT_FAST)
    server.start()
    try:
        _admin(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(TEMPLATE)))
        migrate(server.dsn(TEMPLATE))
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def dsn(postgres_server: EmbeddedPostgres) -> Iterator[str]:
    """Of a fresh migrated database, dropped after the test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    copy = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
    _admin(postgres_server, copy.format(sql.Identifier(name), sql.Identifier(TEMPLATE)))
    yield postgres_server.dsn(name)
    _admin(postgres_server, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    database = Database(dsn, PATIENT)
    yield database
    database.close()


def _memory() -> Path | None:
    """A database is three hundred files: in memory, where there is room, one is copied in a fifth of the time, and no busy disk
    holds a test up."""
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    return MEMORY if roomy else None


def _admin(server: EmbeddedPostgres, statement: sql.Composed) -> None:
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(statement)
