from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_envs.errors import INVALID, UNSUPPORTED, EnvironmentProblem
from runtime_envs.spec import MAX_BYTES, Channel, conda_dependency, parse_spec, pip_dependency

FULL = """\
name: sentiment
channels:
  - conda-forge
  - nodefaults
dependencies:
  - python=3.11
  - pip
  - pip:
    - rouge_score==0.1.2
    - Datasets[vision]>=2,<4 ; python_version < "3.14"
base: host
prefix: /home/me/envs/sentiment
"""


def problem(text: str) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        parse_spec(text)
    return caught.value


def test_a_full_file() -> None:
    spec = parse_spec(FULL)
    assert (spec.name, spec.base, spec.channels) == ("sentiment", "host", (Channel("conda-forge", 3),))
    assert spec.python is not None and (spec.python.line, str(spec.python.specifier)) == (6, "==3.11.*")
    assert [(d.name, d.line) for d in spec.pip] == [("rouge-score", 9), ("datasets", 10)]
    assert spec.conda == ()


@pytest.mark.parametrize("text", ["name: x\n", "name: x\ndependencies:\n", "name: x\ndependencies: []\n"])
def test_dependencies_may_be_empty(text: str) -> None:
    assert parse_spec(text).pip == ()


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: x\ndependencys:\n  - pip\n", 2, "unknown key `dependencys`"),
        ("dependencies: []\n", 1, "no `name`"),
        ("name: X Y\n", 1, "not a usable name"),
        ("name: x\nname: y\n", 2, "twice (first in line 1)"),
        ("- name\n", 1, "must be a mapping"),
        ("name: x\ndependencies: pip\n", 2, "must be a list"),
        (
            "name: x\ndependencies:\n  - pip:\n    - a\n    - b==1\n    - A>2\n",
            6,
            "`a` is there twice (first in line 4)",
        ),
        ("name: x\ndependencies:\n  - conda:\n    - a\n", 3, "unknown key `conda`"),
        ("name: x\ndependencies:\n  - python=[3]\n", 3, "not a version"),
        ("name: x\ndependencies:\n  - numpy=1..0\n", 3, "not a version"),
        ("name: x\ndependencies:\n  - numpy=1.0!1\n", 3, "not a version"),
        ("name: x\ndependencies:\n  - numpy=1.0=py^0\n", 3, "not a version"),
        ("name: x\ndependencies:\n\t- pip\n", 3, "not valid YAML"),
        ("name: x\nchannels: &a [b]\ndependencies: *a\n", 3, "alias"),
        ("name: x\ndependencies:\n  - pip:\n    - a==\n", 4, "not a pip requirement"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, line: int, words: str) -> None:
    caught = problem(text)
    assert (caught.code, caught.line) == (INVALID, line)
    assert words in caught.message and f"line {line}" in caught.message


def test_a_misspelt_key_gets_a_suggestion() -> None:
    assert problem("name: x\ndependencys: []\n").hint == "Did you mean `dependencies`?"


@pytest.mark.parametrize(
    "requirement",
    [
        "-e .",
        "--index-url https://evil.example/simple",
        "--extra-index-url=https://evil.example/simple",
        "-r more.txt",
        "git+https://example.org/a.git",
        "a @ https://example.org/a-1.0-py3-none-any.whl",
        "https://example.org/a-1.0-py3-none-any.whl",
        "a @ file:///etc/passwd",
        "file:a",
        "./a",
        "../a",
        "/srv/a",
        "~/a",
        "a-1.0-py3-none-any.whl",
        "requirements.txt",
    ],
)
def test_pip_lines_name_packages_of_an_index_and_nothing_else(requirement: str) -> None:
    caught = problem(f"name: x\ndependencies:\n  - pip:\n    - '{requirement}'\n")
    assert (caught.code, caught.line) == (INVALID, 4)
    assert caught.hint


@pytest.mark.parametrize("channel", ["defaults", "https://repo.anaconda.com/pkgs/main", "anaconda", "pkgs/r"])
def test_licensed_channels_are_refused(channel: str) -> None:
    caught = problem(f"name: x\nchannels:\n  - conda-forge\n  - {channel}\n")
    assert (caught.code, caught.line, caught.hint) == (UNSUPPORTED, 4, "Use `conda-forge`.")


def test_an_unknown_base_is_refused() -> None:
    assert problem("name: x\nbase: hots\n").hint == "Did you mean `host`?"


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("python=3.11", "3.11.7", "3.12.0"),
        ("python =3.11", "3.11.7", "3.1.1"),
        ("python 3.11.*", "3.11.7", "3.12.0"),
        ("python==3.11.7", "3.11.7", "3.11.8"),
        ("python>=3.10,<3.12", "3.11.7", "3.12.0"),
        ("conda-forge::python=3.11.7=h123_cpython", "3.11.7", "3.11.8"),
        ("python==3.11.7=h123_0", "3.11.7", "3.11.8"),
        ("python!=3.11.*", "3.12.0", "3.11.7"),
        ("python>=3.10.*", "3.12.0", "3.9.7"),
        ("python=3.11,!=3.11.2", "3.11.7", "3.11.2"),
    ],
)
def test_conda_versions(text: str, inside: str, outside: str) -> None:
    dependency = conda_dependency(text, 1)
    assert dependency.name == "python"
    assert inside in dependency.specifier and outside not in dependency.specifier


def test_any_version() -> None:
    assert "1.0" in conda_dependency("numpy", 1).specifier
    assert "1.0" in conda_dependency("numpy=*", 1).specifier


@pytest.mark.parametrize(
    ("text", "match_spec"),
    [
        ("numpy", "numpy"),
        ("numpy=*", "numpy"),
        ("NumPy =2", "numpy 2.*"),
        ("numpy=2.0=py311_0", "numpy ==2.0 py311_0"),
        ("numpy 2.0 py311_0", "numpy ==2.0 py311_0"),
        ("numpy=*=*mkl*", "numpy * *mkl*"),
        ("numpy >= 1.2, <2", "numpy >=1.2,<2"),
        ("mine::numpy=1.26,!=1.26.*", "numpy 1.26.*,!=1.26.*"),
        ("openssl=1.1.1w=h7f8727e_0", "openssl ==1.1.1w h7f8727e_0"),
        ("_libgcc_mutex=0.1=main", "_libgcc_mutex ==0.1 main"),
        ("x264=1!161.3030", "x264 1!161.3030.*"),
    ],
)
def test_what_a_solver_is_asked_for(text: str, match_spec: str) -> None:
    assert conda_dependency(text, 1).match_spec == match_spec


def test_conda_names_that_differ_in_their_spelling_only() -> None:
    lines = "name: x\nbase: cpu\ndependencies:\n  - typing-extensions=4.12\n  - typing_extensions=4.12\n"
    assert len(parse_spec(lines).conda) == 2
    assert problem(lines + "  - Typing_Extensions\n").line == 6
    assert problem(lines + "  - pip:\n    - Typing.Extensions\n").line == 7


def test_too_large_and_too_deep() -> None:
    assert "larger" in problem("name: x\n" + "#" * MAX_BYTES).message
    assert "deeply" in problem("name: x\ndependencies: " + "[" * 20000).message
    assert "more than" in problem("name: x\ndependencies:\n" + "".join(f"  - p{i}\n" for i in range(600))).message


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=300))
def test_any_text_is_read_or_refused(text: str) -> None:
    for candidate in (
        text,
        f"name: x\ndependencies:\n  - pip:\n    - {text}\n",
        f"name: x\ndependencies:\n  - {text}\n",
    ):
        try:
            parse_spec(candidate)
        except EnvironmentProblem as caught:
            assert caught.code in (INVALID, UNSUPPORTED) and caught.message


def test_a_problem_survives_pickling() -> None:
    caught = pickle.loads(pickle.dumps(problem("name: x\nnaem: y\n")))
    assert (caught.code, caught.line, caught.hint) == (INVALID, 2, "Did you mean `name`?")


def test_requirement_lines_stay_as_written() -> None:
    assert pip_dependency('a[b]>=1 ; python_version < "4"', 3).text == 'a[b]>=1 ; python_version < "4"'
