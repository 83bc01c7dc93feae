"""A real PostgreSQL for tests: one server a session, one fresh migrated database a test (copied from a template:
fast)."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
PREFIX, SERVER, OWNER = "heliostat-tests-", "pg", "owner"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[EmbeddedPostgres]:
    sweep(MEMORY)
    with own_folder(_memory()) as folder:
        server = EmbeddedPostgres(folder / SERVER, UNSAFE_BUT_FAST)
        server.start()
        try:
            _admin(server, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(TEMPLATE)))
            migrate(server.dsn(TEMPLATE))
            yield server
        finally:
            server.stop()


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


@contextmanager
def own_folder(place: Path | None) -> Iterator[Path]:
    """Locked for as long as this process lives, however it ends."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    with (folder / OWNER).open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)


def sweep(place: Path, young_s: float = 600.0) -> None:
    """Removes what suites left that were killed, and ends their servers. Others run beside this one, have just begun, or sweep."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):
            found = folder.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < young_s:
                continue
            with (folder / OWNER).open("r+") as owner:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                EmbeddedPostgres(folder / SERVER).end_left_behind()
                shutil.rmtree(folder)


def _memory() -> Path | None:
    """A database is three hundred files: in memory, where there is room for those of all workers, one is copied in a fifth of the
    time, and no busy disk holds a test up."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ROOM_BYTES * workers
    return MEMORY if roomy else None


def _admin(server: EmbeddedPostgres, statement: sql.Composed) -> None:
    with psycopg.connect(server.dsn("postgres"), autocommit=True) as connection:
        connection.execute(statement)
