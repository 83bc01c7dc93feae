"""One Heliostat for all integration tests that do not break it: two `cpu` slots, a tiny Llama, a shelf of wheels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_llama import make_tiny_llama
from builders_wheels import write_wheel
from heliostat_service import Service, ended, started
from turn_taking import TURNS


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    make_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`greeter` 1.0 and 2.0: each says its version whenever an interpreter that has it starts."""
    folder = tmp_path_factory.mktemp("wheels")
    for version in ("1.0", "2.0"):
        files = {"greeter.py": f"print('greeter {version} speaks', flush=True)\n", "greeter.pth": "import greeter\n"}
        write_wheel(folder, "greeter", version, files=files)
    return folder


@pytest.fixture(scope="session")
def service(llama: Path, shelf: Path) -> Iterator[Service]:
    running = started({**TURNS, "PIP_FIND_LINKS": json.dumps([str(shelf)])})
    try:
        running.add_base_model("tiny", llama)
        yield running
    finally:
        ended(running)
