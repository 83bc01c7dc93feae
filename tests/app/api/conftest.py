"""The API as a server, and as an application only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from builders_api import Api, make_api, moved_in, serving, upload

from app.db.embedded import EmbeddedPostgres
from app.db.session import Database


@pytest.fixture(scope="session")
def server(postgres_server: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    nobody_s = Database(postgres_server.dsn("postgres"))
    with serving(make_api(nobody_s, tmp_path_factory.mktemp("server"))) as running:
        yield running
    nobody_s.close()


@pytest.fixture
def api(server: Api, database: Database, tmp_path: Path) -> Iterator[Api]:
    """One server for all tests; database, storage, keys and settings of its own for each."""
    with moved_in(server, database, tmp_path) as own:
        yield own


@pytest.fixture
def acme(api: Api) -> Iterator[httpx.Client]:
    """A tenant's admin, in a cluster with a cpu node, the base model `tiny` and the dataset `rows`."""
    api.add_cluster()
    with api.client() as client:
        assert upload(client).status_code == 201
        yield client
