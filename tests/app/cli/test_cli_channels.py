"""`channel build` as an operator runs it, up to an environment out of what it made."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
from builders_channel import BASE, conda_yml
from builders_wheels import write_wheel
from cli_said import Run

from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import solve_environment
from runtime_envs.policy import EnvironmentPolicy

pytestmark = pytest.mark.integration
OTHERS = ("cp39-cp39-manylinux_2_17_x86_64", "cp311-cp311-macosx_11_0_arm64", "py3-none-win_amd64", "py2-none-any")


def test_a_channel_of_wheels_that_environments_are_made_of(offline: Run, tmp_path: Path) -> None:
    wheels, channel = tmp_path / "wheels", tmp_path / "channel"
    wheels.mkdir()
    for name, version in BASE.items():
        write_wheel(wheels, name, version)
    mine = write_wheel(tmp_path, "mine", "1.0", requires=["nowhere"])
    foreign = [write_wheel(wheels, f"other{n}", "1.0").rename(wheels / f"other{n}-1.0-{tag}.whl").name
               for n, tag in enumerate(OTHERS)]  # fmt: skip
    said = offline("channel", "build", str(channel), "--wheels", str(wheels), "--wheels", str(mine), "--json")
    assert (said.code, said.json["url"], said.json["missing"]) == (0, channel.as_uri(), ["nowhere"])
    python = f"python-{platform.python_version()}-0_cpython"
    assert {python, "pytorch-2.5.0-py_cpu_0", "mine-1.0-py_0"} < set(said.json["packages"])
    assert len(said.json["packages"]) == len(BASE) + 2
    assert sorted(said.json["skipped"]) == sorted(foreign)
    places = CondaPlaces(EnvironmentPolicy({"conda-forge": said.json["url"]}), tmp_path / "cache")
    packages = solve_environment(conda_yml(), places).lock["conda"]
    assert {package["name"] for package in packages} >= {"python", "pytorch", "transformers"}
    again = offline("channel", "build", str(channel), "--wheels", str(wheels), "--python", sys.executable)
    assert all(name in again.err for name in foreign)
    assert again.code == 0 and f'channels = {{ conda-forge = "{channel.as_uri()}" }}' in again.out


def test_what_it_cannot_use(offline: Run, tmp_path: Path) -> None:
    (tmp_path / "x-1.0-py3-none-any.whl").write_text("no")
    said = offline("channel", "build", str(tmp_path / "channel"), "--wheels", str(tmp_path))
    assert said.code != 0 and "not a wheel" in said.err and "Give wheels" in said.err
