"""A host that cannot isolate anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.tools import found_programs


@pytest.fixture
def bare_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system's folders of programs are empty."""
    monkeypatch.setattr(os, "defpath", str(tmp_path))
    _forget()
    yield
    _forget()


def _forget() -> None:
    found_programs.cache_clear()
    ability.cache_clear()
