"""From one node to another that has no channel: through a bundle."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders_channel import conda_yml

from runtime_envs.bundles.archive import write_archive
from runtime_envs.bundles.contents import Imported, export_bundle, import_bundle
from runtime_envs.bundles.fetch import Places
from runtime_envs.bundles.on_node import no_storage
from runtime_envs.bundles.signing import SigningKey, Trust
from runtime_envs.channels.package import Package, write_package
from runtime_envs.conda.engine import index_channel
from runtime_envs.conda.lock import is_conda
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import BUNDLE_INVALID, UNSUPPORTED, EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.lock import Solved

pytestmark = pytest.mark.integration
SITE = "lib/python3.11/site-packages"


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey(tmp_path / "key.pem")


@pytest.fixture
def nowhere(places: CondaPlaces, tmp_path: Path) -> CondaPlaces:
    """Of a site without channel and index."""
    policy = replace(places.policy, channels={"conda-forge": (tmp_path / "no-channel").as_uri()})
    return CondaPlaces(policy, tmp_path / "cache", PipIndex(offline=True))


def exported(solved: Solved, spec: str, key: SigningKey, index: PipIndex, folder: Path, *, whole: bool) -> Path:
    target = folder / "bundle.tar.gz"
    export_bundle(target, (spec, solved.lock), key, Places(index, no_storage), whole=whole)
    return target


def imported(bundle: Path, folder: Path, key: SigningKey, places: CondaPlaces) -> Imported:
    with bundle.open("rb") as source:
        return import_bundle(source, folder, Trust(key.public(), {}), places)


def node_with(found: Imported, root: Path, index: PipIndex) -> Environments:
    """As the service does it: the files lie in storage, and the lock names them."""
    found.solved.lock["bundled"] = {name: name for name in found.files}

    def fetch(key: str, target: Path, sha256: str) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(found.files[key].read_bytes())

    return Environments(root, index, fetch=fetch)


Make = Callable[[str], tuple[Solved, str]]


@pytest.fixture
def make(places: CondaPlaces) -> Make:
    return lambda text: (solve_environment(text, places), text)


def test_all_of_it_on_a_node_without_a_channel(
    make: Make, places: CondaPlaces, nowhere: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    solved, text = make(conda_yml("polite", pip=("big",)))
    here = Environments(tmp_path / "here", places.index).materialize(solved.lock)
    bundle = exported(solved, text, key, places.index, tmp_path, whole=True)
    found = imported(bundle, tmp_path / "unpacked", key, nowhere)
    assert (found.solved.fingerprint, found.signed_by) == (solved.fingerprint, "this Heliostat")
    assert found.solved.dependency_md5 == solved.dependency_md5
    there = node_with(found, tmp_path / "there", nowhere.index)
    made = there.materialize(found.solved.lock)
    assert made.fingerprint == here.fingerprint and there.verify(made.fingerprint, full=True) == []
    code = "import torch, greeter, big.m7; print(torch.VERSION, greeter.VERSION, big.m7.VALUE)"
    said = subprocess.run([made.python, "-c", code], capture_output=True, text=True, check=True, env={})
    assert said.stdout.split() == ["2.5.0+cpu", "1.0", "7"]
    module = made.prefix / SITE / "greeter.py"
    module.write_text("")  # repaired from what came with the bundle
    assert there.repair(made.fingerprint).files == (f"{SITE}/greeter.py",)
    assert there.verify(made.fingerprint, full=True) == []


def test_without_the_base_it_is_small(make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path) -> None:
    """The rest comes from the channel of whoever imports it."""
    solved, text = make(conda_yml("polite"))
    bundle = exported(solved, text, key, places.index, tmp_path, whole=False)
    found = imported(bundle, tmp_path / "unpacked", key, places)
    assert sorted(found.files) == ["greeter-1.0-py_0.conda", "polite-1.0-py_0.conda"]
    there = node_with(found, tmp_path / "there", places.index)
    assert there.verify(there.materialize(found.solved.lock).fingerprint, full=True) == []


def test_stock_conda_can_read_it(make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path) -> None:
    solved, text = make(conda_yml("polite", pip=("big",)))
    with tarfile.open(exported(solved, text, key, places.index, tmp_path, whole=True)) as archive:
        archive.extractall(tmp_path / "plain", filter="data")
    content = yaml.safe_load((tmp_path / "plain" / "environment.yml").read_text())
    assert content["name"] == "tuned" and set(content) == {"name", "channels", "dependencies"}
    assert "greeter=1.0=py_0" in content["dependencies"] and {"pip": ["big==1.0"]} in content["dependencies"]
    head, *lines = (tmp_path / "plain" / "explicit.txt").read_text().splitlines()
    assert head == "@EXPLICIT" and len(lines) == len(solved.lock["conda"])
    assert all((tmp_path / "plain" / line.partition("#")[0]).is_file() for line in lines)


def again(bundle: Path, base: str, places: CondaPlaces) -> Solved:
    """From the environment.yml that the bundle has for stock conda, which knows no bases."""
    with tarfile.open(bundle) as archive:
        member = archive.extractfile("environment.yml")
        assert member is not None
        return solve_environment(member.read().decode() + f"base: {base}\n", places)


def test_what_stock_conda_reads_is_the_same_environment(
    make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    solved, text = make(conda_yml("polite", pip=("big",)))
    bundle = exported(solved, text, key, places.index, tmp_path, whole=True)
    assert again(bundle, "cpu", places).lock == solved.lock


def test_and_so_it_is_with_a_channel_of_the_tenants_own(places: CondaPlaces, key: SigningKey, tmp_path: Path) -> None:
    write_package(tmp_path / "a-channel", Package("greeter", "1.5", "mine_0", noarch=True), [])
    index_channel(tmp_path / "a-channel")
    mine = {**places.policy.channels, "mine": (tmp_path / "a-channel").as_uri()}
    both = replace(places, policy=replace(places.policy, channels=mine))
    text = conda_yml("polite", "mine::greeter")
    solved = solve_environment(text, both)
    assert again(exported(solved, text, key, places.index, tmp_path, whole=True), "cpu", both).lock == solved.lock


def test_and_so_it_is_over_the_platforms_own(
    index: PipIndex, places: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    text = "name: plain\ndependencies:\n  - pip:\n    - polite\n"
    solved = solve_environment(text, places)
    bundle = exported(solved, text, key, index, tmp_path, whole=False)
    assert again(bundle, "host", places).lock == solved.lock


def test_a_base_of_the_platforms_own(
    index: PipIndex, places: CondaPlaces, nowhere: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    text = "name: plain\ndependencies:\n  - pip:\n    - polite\n"
    solved = solve_environment(text, replace(places, index=index))
    assert not is_conda(solved.lock)
    bundle = exported(solved, text, key, index, tmp_path, whole=False)
    found = imported(bundle, tmp_path / "unpacked", key, nowhere)
    assert found.solved.fingerprint == solved.fingerprint
    there = node_with(found, tmp_path / "there", nowhere.index)
    made = there.materialize(found.solved.lock)
    subprocess.run([made.python, "-c", "import polite, greeter"], check=True)


def test_what_is_not_allowed_here(make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path) -> None:
    solved, text = make(conda_yml("polite"))
    bundle = exported(solved, text, key, places.index, tmp_path, whole=False)
    denied = replace(places, policy=replace(places.policy, denied=frozenset({"greeter"})))
    with pytest.raises(EnvironmentProblem) as caught:
        imported(bundle, tmp_path / "denied", key, denied)
    assert caught.value.code == UNSUPPORTED


@pytest.mark.parametrize("base", ["host", "cpu"])
@pytest.mark.parametrize(
    "limit", [{"denied": frozenset({"Big"})}, {"max_packages": 0}, {"max_bytes": 1}], ids=["denied", "number", "size"]
)
def test_nor_what_pip_brings(
    limit: dict[str, Any], base: str, make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    solved, text = make(conda_yml(pip=("big",), base=base))
    if base == "cpu" and "denied" not in limit:  # all but the wheel would be allowed
        sizes = [package["size"] for package in solved.lock["conda"]]
        limit = {"max_packages": len(sizes)} if "max_packages" in limit else {"max_bytes": sum(sizes)}
    bundle = exported(solved, text, key, places.index, tmp_path, whole=False)
    with pytest.raises(EnvironmentProblem) as caught:
        imported(bundle, tmp_path / "here", key, replace(places, policy=replace(places.policy, **limit)))
    assert caught.value.code == UNSUPPORTED


CHANGES: dict[str, dict[str, Any]] = {
    "another key of our storage": {"bundled": {"greeter-1.0-py_0.conda": "tenants/other/secret"}},
    "not a list": {"conda": 3},
    "other places": {"pixi": "version: 6\npackages: []\n"},
    "another base": {"base": {"name": "cpu", "packages": {}}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_lock_that_is_not_what_it_says(
    change: dict[str, Any], make: Make, places: CondaPlaces, key: SigningKey, tmp_path: Path
) -> None:
    """Signed, and refused nevertheless: a key can be stolen."""
    solved, text = make(conda_yml("polite"))
    files = {"lock.json": tmp_path / "lock", "spec.yml": tmp_path / "spec"}
    files["lock.json"].write_text(json.dumps(solved.lock | change))
    files["spec.yml"].write_text(text)
    write_archive(tmp_path / "b.tar.gz", solved.fingerprint, files, key)
    with pytest.raises(EnvironmentProblem) as caught:
        imported(tmp_path / "b.tar.gz", tmp_path / "out", key, places)
    assert caught.value.code == BUNDLE_INVALID
