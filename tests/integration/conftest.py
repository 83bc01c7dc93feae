"""One Heliostat for all integration tests that do not break it: two `cpu` slots, a tiny Llama, two datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_llama import make_tiny_llama
from heliostat_service import SETTINGS, Service, ended, started


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def service(llama: Path) -> Iterator[Service]:
    running = started(SETTINGS)
    try:
        running.add_base_model("tiny", llama)
        yield running
    finally:
        ended(running)
