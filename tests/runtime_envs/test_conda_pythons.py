"""Other Pythons than the platform's: solved, installed and run, where such an interpreter is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from builders_channel import BASE, conda_yml
from builders_wheels import write_wheel

from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import Interpreter, find_interpreter
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.policy import EnvironmentPolicy

pytestmark = pytest.mark.integration


def interpreter(minor: str) -> Interpreter:
    """Of pyenv or on the path, with a prefix of its own."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [*sorted(pyenv.glob(f"{minor}.*/bin/python{minor}")), *filter(None, [shutil.which(f"python{minor}")])]
    for python in found:
        try:
            return find_interpreter(Path(python))
        except EnvironmentProblem:
            continue
    pytest.skip(f"no Python {minor} with a prefix of its own here")


@pytest.mark.parametrize("minor", ["3.10", "3.12", "3.13"])
def test_a_python_beside_the_platforms(minor: str, tmp_path: Path, index: PipIndex) -> None:
    python = interpreter(minor)
    wheels = [write_wheel(tmp_path, name, version) for name, version in BASE.items()]
    build_channel(tmp_path / "channel", wheels, python)
    places = CondaPlaces(EnvironmentPolicy({"conda-forge": (tmp_path / "channel").as_uri()}), tmp_path / "cache", index)
    solved = solve_environment(conda_yml(f"python={minor}", pip=("greeter",)), places)
    assert solved.lock["python"] == python.version
    node = Environments(tmp_path / "node", index)
    made = node.materialize(solved.lock)
    probe = (
        "import platform, sys, json, ssl, greeter, torch; print(platform.python_version(), sys.prefix, greeter.VERSION)"
    )
    done = subprocess.run([made.python, "-c", probe], capture_output=True, text=True, check=True, env={})
    assert done.stdout.split() == [python.version, str(made.prefix), "2.0"]
    assert node.verify(made.fingerprint, full=True) == []
