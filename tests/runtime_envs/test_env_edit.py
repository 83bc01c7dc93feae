from __future__ import annotations

import pytest
from builders_wheels import environment_yml

from runtime_envs.edit import add_packages, diff
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.index import PipIndex
from runtime_envs.lock import default_lock, solve
from runtime_envs.spec import parse_spec


def names(text: str) -> list[str]:
    return [dependency.text for dependency in parse_spec(text).pip]


def test_packages_are_added_and_replaced() -> None:
    text = add_packages(environment_yml("greeter<2", "Polite"), ["polite==1.0", "rouge_score"])
    assert names(text) == ["greeter<2", "polite==1.0", "rouge_score"]


@pytest.mark.parametrize(
    "text", ["name: x\n", "name: x\ndependencies:\n", "name: x\ndependencies:\n- python=3.11\n- pip:\n"]
)
def test_to_a_file_without_pip_packages(text: str) -> None:
    added = add_packages(text, ["greeter"])
    assert names(added) == ["greeter"]
    assert parse_spec(added).python == parse_spec(text).python or "python=3.11" in added


def test_what_a_file_may_not_say_cannot_be_added() -> None:
    with pytest.raises(EnvironmentProblem, match="is a URL"):
        add_packages("name: x\n", ["git+https://example.org/a"])


def test_differences_of_locks(index: PipIndex) -> None:
    before = solve(environment_yml("polite", "six==1.0"), index=index).lock
    after = solve(environment_yml("greeter"), index=index).lock
    changes = diff(before, after)
    assert [(c.name, c.before, c.after) for c in changes.removed] == [("polite", "1.0", None), ("six", "1.0", None)]
    assert [(c.name, c.before, c.after) for c in changes.changed] == [("greeter", "1.0", "2.0")]
    assert [c.name for c in diff(default_lock(), after).added] == ["greeter"]
    assert diff(after, after).as_dict() == {"added": (), "removed": (), "changed": ()}
