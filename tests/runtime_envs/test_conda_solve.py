"""environment.yml over a conda base, against a real channel over HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders_channel import ChannelServer, conda_yml
from builders_wheels import write_wheel

from runtime_envs.conda.lock import read_conda_lock
from runtime_envs.conda.solve import CondaPlaces, CondaPolicy
from runtime_envs.edit import diff
from runtime_envs.environments import solve_environment
from runtime_envs.errors import BASE_UNAVAILABLE, BUILD_FAILED, CHANNEL_FAILED, EnvironmentProblem
from runtime_envs.fingerprint import identity
from runtime_envs.lock import Solved

pytestmark = pytest.mark.integration


def versions(solved: Solved) -> dict[str, str]:
    return {package["name"]: package["version"] for package in solved.lock["conda"]}


def refused(text: str, places: CondaPlaces) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        solve_environment(text, places)
    return caught.value


def test_the_base_and_what_the_tenant_adds(places: CondaPlaces) -> None:
    solved = solve_environment(conda_yml("polite"), places)
    assert versions(solved) | {"python": "3.11"} == {
        "accelerate": "1.0", "deepspeed": "0.19", "greeter": "1.0", "numpy": "2.0", "peft": "0.13", "polite": "1.0",
        "python": "3.11", "pytorch": "2.5.0", "safetensors": "0.5", "tokenizers": "0.20", "transformers": "4.50",
    }  # fmt: skip
    assert solved.lock["base"]["name"] == "cpu" and "polite" not in solved.lock["base"]["packages"]
    assert solve_environment(conda_yml("polite"), places).fingerprint == solved.fingerprint


def test_pip_over_conda(places: CondaPlaces) -> None:
    solved = solve_environment(conda_yml("greeter=1.0", pip=("big", "numpy>=1")), places)
    assert [package["name"] for package in solved.lock["pip"]] == ["big"]
    content = yaml.safe_load(solved.lock["pixi"])
    (pip,) = [package for package in content["packages"] if "pypi" in package]
    assert (pip["name"], pip["sha256"]) == ("big", solved.lock["pip"][0]["sha256"])


def test_a_conflict_is_the_solvers_tree_with_the_line_marked(places: CondaPlaces) -> None:
    problem = refused(conda_yml("polite", "greeter>=2"), places)
    assert (problem.code, problem.line) == ("environment_unsolvable", 4)
    assert "greeter <2, for which no candidates were found.   ◀ environment.yml line 5: greeter>=2" in problem.message


@pytest.mark.parametrize("line", ["rude", "nothere", "numpy=1.0"])
def test_the_base_is_pinned_and_the_line_is_named(line: str, places: CondaPlaces) -> None:
    problem = refused(conda_yml("greeter", line), places)
    assert (problem.code, problem.line) == ("environment_unsolvable", 5)


def test_pip_may_not_replace_a_conda_package(places: CondaPlaces) -> None:
    problem = refused(conda_yml(pip=("numpy==1.0",)), places)
    assert (problem.code, problem.line) == ("environment_unsolvable", 5)
    assert "which pip may not replace" in problem.message


def test_nor_may_what_a_pip_package_needs(places: CondaPlaces, tmp_path: Path) -> None:
    write_wheel(tmp_path, "needs_old_numpy", "1.0", requires=["numpy<2"])
    index = replace(places.index, find_links=(str(tmp_path),))
    problem = refused(conda_yml(pip=("needs_old_numpy",)), replace(places, index=index))
    assert (problem.code, problem.line) == ("environment_unsolvable", 5)
    assert problem.hint is not None and "`cpu` has numpy 2.0" in problem.hint


def test_a_python_that_the_channel_lacks(places: CondaPlaces) -> None:
    problem = refused(conda_yml("python=3.12"), places)
    assert (problem.code, problem.line, problem.fixable_by) == (BASE_UNAVAILABLE, 4, "operator")


def test_the_policy(places: CondaPlaces) -> None:
    strict = replace(places, policy=replace(places.policy, denied=frozenset({"greeter"})))
    assert "`greeter` is not allowed" in refused(conda_yml("greeter"), strict).message
    assert "needs `greeter`, which is not allowed" in refused(conda_yml("polite"), strict).message
    few = replace(places, policy=replace(places.policy, max_packages=5))
    assert "has 9 packages" in refused(conda_yml(), few).message
    assert "channel `bioconda` is not allowed" in refused(conda_yml("bioconda::greeter"), places).message


def test_a_channel_that_is_not_there(places: CondaPlaces, tmp_path: Path) -> None:
    gone = CondaPlaces(CondaPolicy({"conda-forge": "http://127.0.0.1:1"}), tmp_path, places.index)
    problem = refused(conda_yml(), gone)
    assert (problem.code, problem.fixable_by) == (CHANNEL_FAILED, "operator")


def test_a_channel_that_moves_is_the_same_environment(
    places: CondaPlaces, channel: ChannelServer, channel_folder: Path, tmp_path: Path
) -> None:
    elsewhere = CondaPlaces(CondaPolicy({"conda-forge": channel_folder.as_uri()}), tmp_path, places.index)
    here, there = (solve_environment(conda_yml("polite"), where) for where in (places, elsewhere))
    assert channel.url in here.lock["pixi"] and channel.url not in there.lock["pixi"]
    assert here.fingerprint == there.fingerprint == identity(there.lock)


def test_a_lock_with_other_places_is_refused(places: CondaPlaces) -> None:
    lock: dict[str, Any] = solve_environment(conda_yml("polite"), places).lock
    read_conda_lock(lock)
    for changed in (lock["pixi"].replace(lock["conda"][0]["sha256"], "0" * 64), "packages: 1", "a: ["):
        with pytest.raises(EnvironmentProblem, match="Not a lock") as caught:
            read_conda_lock(lock | {"pixi": changed})
        assert caught.value.code == BUILD_FAILED


def test_what_two_environments_differ_in(places: CondaPlaces) -> None:
    one, two = (solve_environment(conda_yml(*packages), places) for packages in (["greeter"], ["polite"]))
    changes = diff(one.lock, two.lock)
    assert [(c.name, c.before, c.after) for c in changes.changed] == [("greeter", "2.0", "1.0")]
    assert [c.name for c in changes.added] == ["polite"]
    assert one.dependency_md5 != two.dependency_md5
