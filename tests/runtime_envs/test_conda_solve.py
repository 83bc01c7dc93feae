"""environment.yml over a conda base, against a real channel over HTTP."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders_channel import ChannelServer, conda_yml
from builders_wheels import write_wheel

from runtime_envs.channels.package import Package, write_package
from runtime_envs.conda.bases import conda_bases
from runtime_envs.conda.engine import index_channel
from runtime_envs.conda.lock import read_conda_lock
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.edit import diff
from runtime_envs.environments import solve_environment
from runtime_envs.errors import (
    BASE_UNAVAILABLE,
    BUILD_FAILED,
    CHANNEL_FAILED,
    UNSOLVABLE,
    UNSUPPORTED,
    EnvironmentProblem,
)
from runtime_envs.fingerprint import identity
from runtime_envs.lock import Solved
from runtime_envs.policy import EnvironmentPolicy

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
    assert (problem.code, problem.line, problem.fixable_by) == (BASE_UNAVAILABLE, 4, "user")


def test_the_policy(places: CondaPlaces) -> None:
    strict = replace(places, policy=replace(places.policy, denied=frozenset({"greeter"})))
    assert "`greeter` is not allowed" in refused(conda_yml("greeter"), strict).message
    assert "needs `greeter`, which is not allowed" in refused(conda_yml("polite"), strict).message
    few = replace(places, policy=replace(places.policy, max_packages=9))
    assert "has 10 packages" in refused(conda_yml("greeter"), few).message
    assert "has 10 packages" in refused(conda_yml(pip=("big",)), few).message
    problem = refused(conda_yml("polite", "bioconda::greeter"), places)
    assert "channel `bioconda` is not allowed" in problem.message and problem.line == 5


def test_the_size_of_all_that_is_fetched(places: CondaPlaces, wheels: Path) -> None:
    conda = solve_environment(conda_yml(), places).lock["conda"]
    size = sum(package["size"] for package in conda) + (wheels / "big-1.0-py3-none-any.whl").stat().st_size
    for max_bytes, allowed in ((size, True), (size - 1, False)):
        limited = replace(places, policy=replace(places.policy, max_bytes=max_bytes))
        if allowed:
            assert solve_environment(conda_yml(pip=("big",)), limited).lock["pip"]
        else:
            assert "has 10 packages" in refused(conda_yml(pip=("big",)), limited).message


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("greeter=1.0=py_0", "1.0"),
        ("greeter==1.0=py_0", "1.0"),
        ("greeter 1.0 py_0", "1.0"),
        ("greeter 1.0 py_*", "1.0"),
        ("greeter=1.0.*", "1.0"),
        ("greeter =1", "1.0"),
        ("greeter = 1.0", "1.0"),
        ("greeter >=1, <2", "1.0"),
        ("greeter >=1,<3 py_0", "2.0"),
        ("greeter=*=py_0", "2.0"),
        ("greeter 1", "1.0"),
        ("Greeter <2", "1.0"),
        ("conda-forge::greeter <2", "1.0"),
        ("https://conda.anaconda.org/conda-forge::greeter=1.0=py_0", "1.0"),
    ],
)
def test_the_ways_to_write_a_conda_package(line: str, version: str, places: CondaPlaces) -> None:
    assert versions(solve_environment(conda_yml(line), places))["greeter"] == version


@pytest.mark.parametrize("line", ["greeter=1.0=py_1", "greeter==1.0.1w", "greeter==1_0-1"])
def test_what_the_channel_does_not_have_is_named_with_its_line(line: str, places: CondaPlaces) -> None:
    assert refused(conda_yml("polite", line), places).line == 5


def test_channels_of_the_file(places: CondaPlaces) -> None:
    text = "channels: [conda-forge, nodefaults]\n" + conda_yml("greeter")
    assert versions(solve_environment(text, places))["greeter"] == "2.0"
    by_url = f"channels:\n  - {places.policy.channels['conda-forge']}/\n" + conda_yml("greeter")
    assert solve_environment(by_url, places).fingerprint == solve_environment(text, places).fingerprint
    problem = refused("channels:\n  - conda-forge\n  - bioconda\n" + conda_yml("greeter"), places)
    assert (problem.code, problem.line) == (UNSUPPORTED, 3)


@pytest.fixture
def gpu_places(places: CondaPlaces, channel_folder: Path, tmp_path: Path) -> CondaPlaces:
    """With what the base `cuda` has more; `kernels` need a GPU, `modern` a libc of tomorrow."""
    folder = tmp_path / "channel"
    shutil.copytree(channel_folder, folder)
    for package in (
        *(Package(spec.split()[0], "1.0", "0") for spec in conda_bases()["cuda"].packages),
        Package("pytorch", "2.5.0", "py_cuda_0", depends=("python 3.11.*", "__cuda")),
        Package("cuda-version", "12.8", "0"),
        Package("cudnn", "9.0", "0"),
        Package("kernels", "1.0", "0", depends=("__cuda >=12.4", "__glibc >=2.17", "__linux", "__unix")),
        Package("modern", "1.0", "0", depends=("__glibc >=2.99",)),
    ):
        write_package(folder, package, [])
    index_channel(folder)
    policy = replace(places.policy, channels={"conda-forge": folder.as_uri()})
    return CondaPlaces(policy, tmp_path / "cache", places.index)


def test_a_channel_in_a_folder_can_be_named_for_what_the_base_has(gpu_places: CondaPlaces) -> None:
    solved = solve_environment(conda_yml("conda-forge::numpy", "conda-forge::python", base="cuda"), gpu_places)
    assert versions(solved)["numpy"] == "2.0"


def test_what_nodes_have_is_the_bases_word_not_this_machines(gpu_places: CondaPlaces) -> None:
    assert versions(solve_environment(conda_yml("kernels", base="cuda"), gpu_places))["kernels"] == "1.0"
    problem = refused(conda_yml("greeter", "kernels"), gpu_places)
    assert (problem.code, problem.line) == (UNSOLVABLE, 5) and "__cuda" in problem.message
    problem = refused(conda_yml("modern", base="cuda"), gpu_places)
    assert (problem.code, problem.line) == (UNSOLVABLE, 4) and "__glibc" in problem.message


def test_a_package_of_a_named_channel(places: CondaPlaces, tmp_path: Path) -> None:
    write_package(tmp_path / "mine", Package("greeter", "1.5", "mine_0", noarch=True), [])
    index_channel(tmp_path / "mine")
    mine = (tmp_path / "mine").as_uri()
    policy = replace(places.policy, channels={**places.policy.channels, "mine": mine})
    both = replace(places, policy=policy)
    assert versions(solve_environment(conda_yml("greeter"), both))["greeter"] == "2.0"
    for line in ("mine::greeter", "mine::greeter >=1", f"{mine}::greeter=1.5=mine_0"):
        solved = solve_environment(conda_yml(line), both)
        assert versions(solved)["greeter"] == "1.5" and mine in solved.lock["pixi"]
    problem = refused(conda_yml("polite", "mine::greeter>=2"), both)
    assert (problem.code, problem.line) == (UNSOLVABLE, 5)
    assert refused(conda_yml("mine::numpy"), both).line == 4  # the base's own stays the base's


def test_a_channel_that_is_not_there(places: CondaPlaces, tmp_path: Path) -> None:
    gone = CondaPlaces(EnvironmentPolicy({"conda-forge": "http://127.0.0.1:1"}), tmp_path, places.index)
    problem = refused(conda_yml(), gone)
    assert (problem.code, problem.fixable_by) == (CHANNEL_FAILED, "operator")


def test_a_channel_that_moves_is_the_same_environment(
    places: CondaPlaces, channel: ChannelServer, channel_folder: Path, tmp_path: Path
) -> None:
    elsewhere = CondaPlaces(EnvironmentPolicy({"conda-forge": channel_folder.as_uri()}), tmp_path, places.index)
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
