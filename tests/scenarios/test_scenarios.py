"""Plays the tables of this folder (README.md says what they hold)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from scenario_stage import Stage
from scenario_table import Table, read_table

from cluster.core.state import ClusterState

FOLDER = Path(__file__).parent
SCENARIOS = sorted(FOLDER.glob("*.yaml"))
ALWAYS: dict[str, Any] = {"told": {}, "parked": {}}
"""What a step that says who runs need not say."""


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_scenario(file: Path) -> None:
    table = read_table(file)
    stage = _played(table, forgetful=False)
    again = _played(table, forgetful=True)
    assert again.timeline == stage.timeline, f"{table.title}: a scheduler that was killed decides otherwise"


def _played(table: Table, forgetful: bool) -> Stage:
    stage = Stage(table, forgetful)
    stage.begin()
    for step in table.steps:
        stage.play(step)
        _check(stage, step, table.title)
        _check_settled(stage, table.title)
    return stage


def _check(stage: Stage, step: dict[str, Any], title: str) -> None:
    found, wanted = stage.comes_of_it(), {**(ALWAYS if "running" in step else {}), **step}
    for key in found.keys() & wanted.keys():
        got = found[key] if key in ("running", "told", "parked", "waiting") else _asked(found[key], wanted[key])
        assert _fits(got, wanted[key]), (
            f"\n{title}\nat {stage.now:g} s, {key}:\n  expected {wanted[key]}\n  got      {got}\n{stage.story()}"
        )


def _asked(found: dict[str, float], wanted: dict[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in wanted if name in found}


def _fits(got: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return got.keys() == wanted.keys() and all(_is(got[name], value) for name, value in wanted.items())


def _is(got: Any, wanted: Any) -> bool:
    """A pair is a range."""
    return bool(wanted[0] <= got <= wanted[1] if isinstance(wanted, list) else got == wanted)


def _check_settled(stage: Stage, title: str) -> None:
    settled = stage.state.snapshot()
    for _ in range(5):
        assert stage.state.decide(stage.now) == [], f"{title}: five more rounds change something"
    assert stage.state.snapshot() == settled, f"{title}: deciding changed something"
    assert ClusterState.rebuilt(settled, stage.state.policy).snapshot() == settled


def test_there_are_forty_scenarios() -> None:
    assert len(SCENARIOS) >= 40


def test_the_readme_has_a_line_for_each_scenario() -> None:
    readme = (FOLDER / "README.md").read_text()
    lines = [f"- `{file.stem}`: {file.read_text().splitlines()[0].removeprefix('title: ')}" for file in SCENARIOS]
    assert [line for line in lines if line not in readme.splitlines()] == []


def test_an_expectation_that_is_not_met_is_told_with_what_happened(tmp_path: Path) -> None:
    table = yaml.safe_load((FOLDER / "02-first-come-first-served.yaml").read_text())
    table["steps"][0]["running"] = {"a-late": "n1[0]"}
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(table))
    with pytest.raises(AssertionError, match=r"(?s)expected \{'a-late'.*got +\{'b-early'.*b-early has n1\[0\]"):
        _played(read_table(wrong), forgetful=False)


def test_a_misspelt_word_is_an_error(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("{title: t, nodes: {}, steps: [{runing: {}, waiting: {}}]}")
    with pytest.raises(AssertionError, match="runing"):
        read_table(wrong)
