"""What an operator allows, over the base `host`; of conda bases and imports in their own tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders_wheels import environment_yml, write_wheel

from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import solve_environment
from runtime_envs.errors import UNSUPPORTED, EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.policy import EnvironmentPolicy
from runtime_envs.spec import parse_spec


def refused(text: str, index: PipIndex, cache: Path, **policy: Any) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        solve_environment(text, CondaPlaces(EnvironmentPolicy({}, **policy), cache, index))
    assert caught.value.code == UNSUPPORTED
    return caught.value


@pytest.mark.parametrize("denied", ["needs-platform", "Needs_Platform", "needs.platform"])
def test_a_package_that_is_denied_however_it_is_spelt(denied: str, index: PipIndex, tmp_path: Path) -> None:
    problem = refused(environment_yml("big", "needs_platform"), index, tmp_path, denied=frozenset({denied}))
    assert problem.line == 5 and "`needs-platform` is not allowed" in problem.message


def test_what_a_package_needs_is_denied_too(index: PipIndex, tmp_path: Path) -> None:
    problem = refused(environment_yml("polite"), index, tmp_path, denied=frozenset({"Greeter"}))
    assert "needs `greeter`, which is not allowed" in problem.message


def test_a_denied_package_has_one_name_on_conda_and_pip() -> None:
    spec = parse_spec("name: x\nbase: cpu\ndependencies:\n  - torchvision\n  - PyTorch\n")
    EnvironmentPolicy({}, denied=frozenset({"tor"})).check_spec(spec)
    with pytest.raises(EnvironmentProblem) as caught:
        EnvironmentPolicy({}, denied=frozenset({"torch"})).check_spec(spec)
    assert caught.value.line == 5


def test_their_number_and_their_size(index: PipIndex, tmp_path: Path) -> None:
    text = environment_yml("polite", "big")
    assert "has 3 packages" in refused(text, index, tmp_path, max_packages=2).message
    heavy = write_wheel(tmp_path, "heavy", "1.0", files={"heavy.py": "#" * 4096})
    there = PipIndex(find_links=(str(tmp_path),), offline=True, cache_dir=index.cache_dir)
    size = heavy.stat().st_size
    assert "has 1 packages" in refused(environment_yml("heavy"), there, tmp_path, max_bytes=size - 1).message
    allowed = CondaPlaces(EnvironmentPolicy({}, max_bytes=size, max_packages=1), tmp_path, there)
    assert solve_environment(environment_yml("heavy"), allowed).lock["pip"]
