"""A tiny base model, its data, and a source of launchers, shared by the tests of the child."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_child import Child, Zygote, zygote
from builders_llama import capital_rows, make_tiny_llama, write_rows


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def capitals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows: the third batch of four is short."""
    return write_rows(tmp_path_factory.mktemp("data") / "capitals.jsonl", capital_rows(10))


@pytest.fixture(scope="session")
def _zygote() -> Iterator[Zygote]:
    with zygote() as started:
        yield started


@pytest.fixture
def child(_zygote: Zygote) -> Child:
    return _zygote.child()


@pytest.fixture
def second_child(_zygote: Zygote) -> Child:
    return _zygote.child()
