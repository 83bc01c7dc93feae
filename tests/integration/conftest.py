"""One Heliostat for all integration tests that do not break it: two `cpu` slots, a tiny Llama, two datasets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_llama import make_tiny_llama
from heliostat_service import Row, Service, ended, started

SETTINGS = {
    "NODE__KIND": "cpu",
    "NODE__SLOTS": "2",
    "TRAINING__CHECKPOINT_EVERY_S": "0.5",
    "SCHEDULER__LEASE_TTL_S": "12",
    "SCHEDULER__MARGIN_S": "3",
    "SCHEDULER__POLL_S": "0.5",
}


def rows(count: int) -> list[Row]:
    """Arithmetic that a tiny model can fit: enough to see a loss fall."""
    return [{"prompt": f"the colour of {n % 7} is", "completion": f" {'red' if n % 7 < 4 else 'blue'}"} for n in range(count)]


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
