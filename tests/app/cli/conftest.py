"""The `heliostat` command in this process, against a server that the test steers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_said import Run, Said
from fake_service import TOKEN, FakeService, serving
from typer.testing import CliRunner

from app.cli.main import app


@pytest.fixture(scope="session")
def running_service() -> Iterator[FakeService]:
    with serving(FakeService()) as running:
        yield running


@pytest.fixture
def service(running_service: FakeService) -> FakeService:
    """As new."""
    running_service.__init__(url=running_service.url)  # type: ignore[misc]
    return running_service


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No settings of the machine that runs the test."""
    for name in ("URL", "TOKEN", "TOKEN_FILE", "CONTEXT", "CONFIG_FILE"):
        monkeypatch.delenv(f"HELIOSTAT_{name}", raising=False)
    monkeypatch.setattr("app.cli.stream.PAUSES_S", (0.01,))
    monkeypatch.setattr("app.cli.commands.base_models.POLL_S", 0.01)
    monkeypatch.setattr("app.cli.client.Retry.first_s", 0.001)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HELIOSTAT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def offline(home: Path) -> Run:
    """The command without a service."""

    def run(*arguments: str) -> Said:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Said(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def cli(offline: Run, service: FakeService, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("HELIOSTAT_URL", service.url)
    monkeypatch.setenv("HELIOSTAT_TOKEN", TOKEN)
    return offline
