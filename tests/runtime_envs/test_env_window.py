from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from runtime_envs.errors import UNSUPPORTED, EnvironmentProblem
from runtime_envs.spec import parse_spec
from runtime_envs.window import allows_from, check_host, check_window


def refused(text: str, python: str = "3.11.7") -> EnvironmentProblem:
    spec = parse_spec(text)
    with pytest.raises(EnvironmentProblem) as caught:
        check_window(spec)
        check_host(spec, python)
    assert caught.value.code == UNSUPPORTED
    return caught.value


def test_the_old_stack_is_refused_with_its_line() -> None:
    old = "name: x\ndependencies:\n  - python=3.9\n  - pytorch=2.0\n  - transformers=4.30\n"
    assert refused(old).line == 3
    assert "3.10–3.13" in str(refused(old).hint)
    assert refused(old.replace("3.9", "3.11")).line == 4
    assert refused(old.replace("3.9", "3.11").replace("=2.0", "=2.6")).line == 5


@pytest.mark.parametrize(
    "requirement", ["torch==2.0", "torch<2.4", "torch~=2.3.0", "transformers==4.30.*", "peft<=0.11.1"]
)
def test_pip_lines_outside_the_window(requirement: str) -> None:
    assert refused(f"name: x\ndependencies:\n  - pip:\n    - {requirement}\n").line == 4


@pytest.mark.parametrize(
    "requirement", ["torch", "torch>=2.0", "torch~=2.0", "torch>2.4,<2.5", "transformers>=4,<5", "peft!=0.12"]
)
def test_pip_lines_that_allow_something_inside(requirement: str) -> None:
    check_window(parse_spec(f"name: x\ndependencies:\n  - pip:\n    - {requirement}\n"))


@pytest.mark.parametrize("python", ["3.9", "3.14", "2.7", "3.1"])
def test_pythons_outside(python: str) -> None:
    assert refused(f"name: x\ndependencies:\n  - python={python}\n").line == 3


@pytest.mark.parametrize("python", ["3.10", "3.13"])
def test_another_supported_python_needs_another_base(python: str) -> None:
    check_window(parse_spec(f"name: x\ndependencies:\n  - python={python}\n"))
    assert refused(f"name: x\ndependencies:\n  - python={python}\n").hint == "Write `python=3.11`, or leave Python out."


def test_conda_packages_are_sent_to_pip() -> None:
    assert refused("name: x\ndependencies:\n  - pytorch>=2.4\n").hint == "Move it under `- pip:` as `torch`."


@pytest.mark.parametrize(
    ("specifier", "expected"),
    [
        ("==2.4", True),
        ("==2.3.*", False),
        (">=2.3,<2.4", False),
        ("===weird", False),
        ("<3,>2.9", True),
        ("==2.5+cpu", True),
    ],
)
def test_ranges(specifier: str, expected: bool) -> None:
    assert allows_from(SpecifierSet(specifier), Version("2.4")) is expected
