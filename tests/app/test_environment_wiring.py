"""A node's environments under the cluster's errors and checks: whose fault it is, and what is put right before a job uses it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from builders_wheels import environment_yml, write_wheel

from app.errors import status_of
from app.settings import Settings
from app.wiring.environments import NodeEnvironments, solve_environment
from cluster.environment_checks import EnvironmentChecks
from cluster.errors import EnvironmentError_, HeliostatError, Unavailable
from runtime_envs.environments import Environments
from runtime_envs.index import PipIndex
from runtime_envs.lock import default_lock, solve


@pytest.fixture
def index(tmp_path: Path) -> PipIndex:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    write_wheel(wheels, "greeter", "1.0")
    return PipIndex(find_links=(str(wheels),), offline=True, cache_dir=tmp_path / "solve-cache")


def lock_of(index: PipIndex) -> dict[str, Any]:
    return solve(environment_yml("greeter"), index=index).lock


def test_a_node_that_cannot_make_it_is_no_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable) as caught:
        NodeEnvironments(Environments(tmp_path / "file")).materialize(default_lock())
    assert (caught.value.code, caught.value.fixable_by) == ("environment_build_failed", "operator")


@pytest.mark.parametrize(
    ("text", "kind", "status"),
    [
        ("name: a\nbase: cpu\ndependencies: []\n", Unavailable, 503),  # of a channel that is not there
        ("name: a\ndependencies: [torch<2]\n", EnvironmentError_, 422),
    ],
)
def test_whose_fault_it_is(tmp_path: Path, text: str, kind: type[HeliostatError], status: int) -> None:
    settings = Settings.model_validate(
        {"data_dir": tmp_path, "environments": {"channels": {"conda-forge": (tmp_path / "nowhere").as_uri()}}}
    )
    with pytest.raises(kind) as caught:
        solve_environment(settings, text)
    assert status_of(caught.value) == status


def test_what_is_damaged_is_put_back_before_it_is_used(tmp_path: Path, index: PipIndex) -> None:
    checks = EnvironmentChecks(NodeEnvironments(Environments(tmp_path / "node", index)))
    made = checks.prepare(lock_of(index))
    module = next(made.prefix.rglob("greeter.py"))
    module.write_text("VERSION = 'changed'\n")
    assert checks.prepare(lock_of(index)).prefix == made.prefix
    assert module.read_text() == 'VERSION = "1.0"\n'
    said = {(check.kind, check.status) for check in checks.last([made.fingerprint])}
    assert said == {("full", "repaired"), ("quick", "ok")}


def test_what_a_job_uses_is_not_put_back_under_it(tmp_path: Path, index: PipIndex) -> None:
    environments = Environments(tmp_path / "node", index)
    checks = EnvironmentChecks(NodeEnvironments(environments))
    made = checks.prepare(lock_of(index))
    next(made.prefix.rglob("greeter.py")).write_text("VERSION = 'changed'\n")
    with subprocess.Popen([made.python, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as job:
        with pytest.raises(Unavailable, match="is being used"):
            checks.prepare(lock_of(index))
        job.communicate()
    said = {(check.kind, check.status) for check in checks.last([made.fingerprint])}
    assert said == {("quick", "damaged"), ("full", "failed")}
