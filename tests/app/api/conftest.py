"""The API as a server, and as an application only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from builders_api import Api, make_api, serving, upload

from app.db.session import Database


@pytest.fixture
def api(database: Database, tmp_path: Path) -> Iterator[Api]:
    with serving(make_api(database, tmp_path)) as running:
        yield running


@pytest.fixture
def acme(api: Api) -> Iterator[httpx.Client]:
    """A tenant's admin, in a cluster with a cpu node, the base model `tiny` and the dataset `rows`."""
    api.add_cluster()
    with api.client() as client:
        assert upload(client).status_code == 201
        yield client
