"""Packages that bring what the platform believes, runs, removes by or shares: refused whole, and nothing of it has happened."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_channel import conda_yml
from builders_wheels import environment_yml, write_wheel

from runtime_envs.adopt import adopt, fold
from runtime_envs.conda.bytecode import Compiler, compile_files
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import BUILD_FAILED, EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.lock import solve
from runtime_envs.materialize import HostEnvironments
from runtime_envs.verify import full_verify

LIB = f"lib/python3.{sys.version_info.minor}"
PYTHON = f"bin/python3.{sys.version_info.minor}"
META = "conda-meta/python-3.11.7-0_cpython.json"


@pytest.fixture
def shelf(tmp_path: Path) -> PipIndex:
    (tmp_path / "shelf").mkdir()
    return PipIndex(find_links=(str(tmp_path / "shelf"),), offline=True, cache_dir=tmp_path / "solve-cache")


def put(shelf: PipIndex, data: dict[str, str], name: str = "evil", **files: str) -> None:
    """A wheel; `data` go to the root of the prefix."""
    placed = {f"{name}-1.0.data/data/{place}": text for place, text in data.items()}
    write_wheel(Path(shelf.find_links[0]), name, "1.0", files={f"{name}.py": "", **placed, **files})


def refused(make: Callable[[], Any], brings: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        make()
    problem = caught.value
    assert (problem.code, problem.fixable_by) == (BUILD_FAILED, "user"), problem.message
    assert "evil" in problem.message and brings.rpartition("/")[2] in problem.message and problem.hint


# --- over the base host ---

HOST = [
    "pyvenv.cfg",
    "bin/python",
    PYTHON,
    f"{LIB}/site-packages/heliostat_platform.pth",
    "conda-meta/history",
    "lib64",
]


@pytest.mark.parametrize("place", HOST)
def test_what_makes_a_prefix_is_not_for_wheels(place: str, shelf: PipIndex, tmp_path: Path) -> None:
    put(shelf, {place: "#!/bin/sh\n"})
    node = HostEnvironments(tmp_path / "node", shelf)
    refused(lambda: node.materialize(solve(environment_yml("evil"), index=shelf).lock), place)
    assert node.ready() == frozenset()


def test_a_script_of_the_same_name_leaves_the_others_file_alone(shelf: PipIndex, tmp_path: Path) -> None:
    """The files of one wheel are hard links into a cache that all environments share."""
    put(shelf, {"bin/tool": "the other's\n"}, name="other")
    put(shelf, {}, **{"evil-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = evil:main\n"})
    node = HostEnvironments(tmp_path / "node", shelf)
    other = node.materialize(solve(environment_yml("other"), index=shelf).lock)
    node.materialize(solve(environment_yml("evil", "other"), index=shelf).lock)
    assert full_verify(other.prefix.parent) == []
    assert (other.prefix / "bin" / "tool").read_text() == "the other's\n"


def test_links_are_followed_inside_the_prefix_only(tmp_path: Path) -> None:
    staged, prefix, outside = tmp_path / "staged", tmp_path / "prefix", tmp_path / "outside"
    for folder in (staged / "lib64" / "deep", prefix / "lib" / "deep", outside):
        folder.mkdir(parents=True)
    (prefix / "lib64").symlink_to("lib")
    (staged / "lib64" / "deep" / "module.py").write_text("1\n")
    assert adopt(staged, prefix) == ["lib/deep/module.py"] and not staged.exists()
    (staged / "share").mkdir(parents=True)
    (staged / "share" / "planted").touch()
    (prefix / "share").symlink_to(outside)
    with pytest.raises(EnvironmentProblem, match="share"):
        adopt(staged, prefix)
    assert list(outside.iterdir()) == []


def test_two_names_of_one_folder_are_one(tmp_path: Path) -> None:
    """As two wheels of one namespace are, where the platform's Python has lib64."""
    staged, prefix = tmp_path / "staged", tmp_path / "prefix"
    for name in ("lib", "lib64"):
        (staged / name / "google").mkdir(parents=True)
        (staged / name / "google" / f"{name}.py").write_text(f"{name}\n")
    (prefix / "lib").mkdir(parents=True)
    (prefix / "lib64").symlink_to("lib")
    fold(staged, prefix)
    assert sorted(adopt(staged, prefix)) == ["lib/google/lib.py", "lib/google/lib64.py"]
    for name in ("lib", "lib64"):
        (staged / name).mkdir(parents=True)
        (staged / name / "same.py").write_text(f"{name}\n")
    with pytest.raises(EnvironmentProblem, match=r"same\.py"):
        fold(staged, prefix)


def test_names_of_files_choose_nothing(tmp_path: Path) -> None:
    """The compiler is told which files to read and to write."""
    planted = tmp_path / "planted.pyc"
    (tmp_path / "module.py").write_text("1\n")
    strange = tmp_path / f"a\tb\n{tmp_path}/module.py\t{planted}\nc.py"
    strange.parent.mkdir(parents=True)
    strange.write_text("2\n")
    with (tmp_path / "lock").open("w") as lock:
        compiler = Compiler(Path(sys.executable), tmp_path / "3.11", lock.fileno())
        compile_files([(strange, tmp_path / "strange.pyc")], compiler)
    assert (tmp_path / "strange.pyc").exists() and not planted.exists()


# --- over conda bases ---


class Scene:
    """A node with somebody's environment, and a shelf for the attacker's wheels."""

    def __init__(self, root: Path, places: CondaPlaces, shelf: PipIndex) -> None:
        self.node = Environments(root, shelf)
        self.places = replace(places, index=shelf)
        self.others = self.make()

    def make(self, *conda: str, pip: tuple[str, ...] = ()) -> Any:
        return self.node.materialize(solve_environment(conda_yml(*conda, pip=pip), self.places).lock)

    def unharmed(self) -> None:
        assert self.node.ready() == {self.others.fingerprint}
        assert self.node.verify(self.others.fingerprint, full=True) == []


@pytest.fixture
def scene(tmp_path: Path, places: CondaPlaces, shelf: PipIndex) -> Scene:
    return Scene(tmp_path / "node", places, shelf)


def record(folder: Path, path: str) -> str:
    """As the installer writes it."""
    paths = [{"_path": path, "path_type": "hardlink", "sha256": "0" * 64, "size_in_bytes": 0}]
    named = {"name": "zzz", "version": "1.0", "build": "0", "build_number": 0, "subdir": "noarch", "depends": []}
    places = {"fn": "zzz-1.0-0.conda", "url": "file:///zzz-1.0-0.conda", "channel": "c", "sha256": "0" * 64}
    described = {"paths_version": 1, "paths": paths}
    return json.dumps(named | places | {"extracted_package_dir": str(folder), "files": [path], "paths_data": described})


@pytest.mark.integration
def test_a_forged_record_names_no_interpreter(scene: Scene, shelf: PipIndex, tmp_path: Path) -> None:
    """With a file that another environment cannot be cloned beside."""
    ran, folder = tmp_path / "ran", tmp_path / "attackers"
    (folder / "bin").mkdir(parents=True)
    script = folder / PYTHON
    script.write_text(f"#!/bin/sh\ntouch {ran}\n")
    script.chmod(0o755)
    true = json.loads((scene.others.prefix / META).read_bytes())
    put(shelf, {META: json.dumps(true | {"extracted_package_dir": str(folder)})}, **{"numpy.py": "mine = 1\n"})
    refused(lambda: scene.make(pip=("evil",)), META)
    assert not ran.exists()
    scene.unharmed()


@pytest.mark.integration
def test_a_forged_record_removes_nothing(scene: Scene, shelf: PipIndex, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    climbing = "../" * len(scene.others.prefix.parts) + str(victim).lstrip("/")
    put(shelf, {"conda-meta/zzz-1.0-0.json": record(tmp_path, climbing)})
    refused(lambda: scene.make("greeter", pip=("evil",)), "conda-meta/zzz-1.0-0.json")
    assert victim.exists()
    scene.unharmed()


CONDA = [
    "conda-meta/history",
    "pyvenv.cfg",
    "bin/python",
    PYTHON,
    f"{LIB}/json/decoder.py",
    f"{LIB}/site-packages/numpy.py",
]


@pytest.mark.integration
def test_nothing_of_conda_is_replaced_by_a_wheel(scene: Scene, shelf: PipIndex) -> None:
    for place in CONDA:
        put(shelf, {place: "mine = 1\n"})
        refused(lambda: scene.make(pip=("evil",)), place)
        scene.unharmed()


@pytest.mark.integration
def test_the_same_file_in_both_is_no_conflict(scene: Scene, shelf: PipIndex) -> None:
    put(shelf, {}, **{"numpy.py": 'VERSION = "2.0"\n'})
    made = scene.make(pip=("evil",))
    assert scene.node.verify(made.fingerprint, full=True) == []
    numpy = f"{LIB}/site-packages/numpy.py"
    assert (made.prefix / numpy).samefile(scene.others.prefix / numpy)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("packages", "brings"),
    [
        (["shadows"], PYTHON),
        (["climbs"], "../climbs-1.0-0/planted"),
        (["forges"], "conda-meta/forged-1.0-0.json"),
        (["holds", "links"], "share/place"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("python_first", [False, True])
def test_a_conda_package_stays_in_the_prefix_and_in_its_own_files(
    packages: list[str], brings: str, python_first: bool, scene: Scene, shelf: PipIndex
) -> None:
    put(shelf, {})
    with pytest.raises(EnvironmentProblem) as caught:
        scene.make(*packages, pip=("evil",) if python_first else ())
    assert (caught.value.code, caught.value.fixable_by) == (BUILD_FAILED, "user"), caught.value.message
    assert brings in caught.value.message
    scene.unharmed()
    assert not list((scene.others.prefix.parent.parent).glob("*/climbs*"))


@pytest.mark.integration
def test_what_is_cloned_follows_no_links(scene: Scene) -> None:
    """`holds` from the environment that has it, after `links` by the installer."""
    scene.others = scene.make("holds")
    with pytest.raises(EnvironmentProblem, match="share/place"):
        scene.make("holds", "links")
    assert not [path for path in scene.others.prefix.parents[1].glob("*/planted") if path.exists()]
