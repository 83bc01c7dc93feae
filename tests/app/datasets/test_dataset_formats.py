"""Every row format: recognised by its keys, made canonical, and what the model learns from it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.datasets.formats import Format, canonical, detect, task_of
from app.datasets.preview import render
from app.datasets.problems import BadRow

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
QA = [USER, ANSWER]


def calling(arguments: Any, **more: Any) -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": arguments, **more}
    return [{"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]}]


ROWS: list[tuple[dict[str, Any], Format, dict[str, Any]]] = [
    ({"messages": QA}, Format.MESSAGES, {"messages": QA}),
    (
        {"messages": [*QA, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1.0}], "id": 7},
        Format.MESSAGES,
        {"messages": [*QA, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
        Format.MESSAGES,
        {"messages": QA},
    ),
    (
        {"messages": [USER, {**calling('{"a": 1}')[0], "content": None}], "tools": [{"t": 1}]},
        Format.MESSAGES,
        {"messages": [USER, *calling('{"a": 1}')], "tools": [{"t": 1}]},
    ),
    ({"messages": calling({"a": 1})}, Format.MESSAGES, {"messages": calling({"a": 1})}),
    (
        {"messages": [*calling({}), {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}, ANSWER]},
        Format.MESSAGES,
        {"messages": [*calling({}), {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"}, ANSWER]},
    ),
    ({"prompt": "p", "completion": "c"}, Format.PROMPT_COMPLETION, {"prompt": "p", "completion": "c"}),
    (
        {"prompt": [*QA, USER], "completion": [ANSWER]},
        Format.PROMPT_COMPLETION,
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
    ),
    ({"text": "t"}, Format.TEXT, {"text": "t"}),
    ({"text": "t", "label": 3}, Format.TEXT_LABEL, {"text": "t", "label": 3}),
    ({"instruction": "q", "input": "", "output": "a", "text": "…"}, Format.ALPACA, {"messages": QA}),
    (
        {"instruction": "q", "input": "x", "output": "a"},
        Format.ALPACA,
        {"messages": [{"role": "user", "content": "q\n\nx"}, ANSWER]},
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        Format.SHAREGPT,
        {"messages": [{"role": "system", "content": "s"}, *QA]},
    ),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        Format.PREFERENCE,
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ),
    (
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]},
        Format.PREFERENCE_OPENAI,
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
    ),
]


@pytest.mark.parametrize(("row", "format", "stored"), ROWS)
def test_formats_are_told_by_their_keys(row: dict[str, Any], format: Format, stored: dict[str, Any]) -> None:
    assert detect(row) is format
    assert canonical(row, format) == stored


def test_tasks() -> None:
    assert {format: task_of(format) for format in (Format.PREFERENCE, Format.TEXT_LABEL, Format.ALPACA)} == {
        Format.PREFERENCE: "preference",
        Format.TEXT_LABEL: "sequence_classification",
        Format.ALPACA: "causal_lm",
    }


BAD: list[tuple[dict[str, Any], str]] = [
    ({"message": QA}, "did you mean messages"),
    ({}, "no known format"),
    ({"prompt": "p"}, "no known format"),
    ({"messages": []}, "at least one turn"),
    ({"messages": "hello"}, "not a list"),
    ({"messages": [USER]}, "nothing would be learned"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing would be learned"),
    ({"messages": [USER, {**ANSWER, "content": ""}]}, "nothing would be learned"),
    ({"messages": [USER, {**ANSWER, "weight": 2}]}, "turn 2 has a weight"),
    ({"messages": [USER, {**ANSWER, "weight": True}]}, "turn 2 has a weight"),
    ({"messages": [{"role": "robot", "content": "x"}, ANSWER]}, "turn 1 has no role"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "turn 1 has no role"),
    ({"messages": ["hi", ANSWER]}, "turn 1 is not an object"),
    ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "turn 1 has no text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "other than text"),
    ({"messages": [{**ANSWER, "tool_calls": {"name": "f"}}]}, "turn 1 has tool_calls that are not a list"),
    ({"messages": [{**ANSWER, "tool_calls": [{"id": "1"}]}]}, "turn 1 has a tool call without the name"),
    ({"messages": [{**ANSWER, "tool_calls": ["f"]}]}, "turn 1 has a tool call without the name"),
    ({"messages": calling("f(x)")}, "turn 1 has a tool call whose arguments are not a JSON object"),
    ({"messages": calling("[1]")}, "arguments are not a JSON object"),
    ({"messages": calling("[" * 5000)}, "arguments are not a JSON object"),
    ({"messages": calling(None)}, "arguments are not a JSON object"),
    ({"messages": QA, "tools": "none"}, "tools is not a list"),
    ({"prompt": 3, "completion": "c"}, "prompt is not text"),
    ({"prompt": "p", "completion": "  "}, "completion is empty"),
    ({"prompt": [USER], "completion": "c"}, "both be text or both be messages"),
    ({"text": ""}, "text is empty"),
    ({"text": "t", "label": 0.5}, "label is neither"),
    ({"conversations": [{"from": "martian", "value": "x"}]}, "unknown `from`"),
    ({"conversations": [{"value": "x"}]}, "no `from`"),
    ({"chosen": "a", "rejected": [ANSWER]}, "all be text or all be messages"),
    ({"input": "x", "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, "input is not an object"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        canonical(row, detect(row))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["messages", "prompt", "completion", "text", "label", "instruction", "output", "conversations"])


@given(st.dictionaries(keys, json_values))
def test_any_row_is_canonical_or_bad(row: dict[str, Any]) -> None:
    try:
        stored = canonical(row, detect(row))
    except BadRow:
        return
    assert any(span["loss"] for span in render(stored))


def test_the_preview_marks_what_is_learned() -> None:
    turns = [USER, {**ANSWER, "weight": 0}, USER, ANSWER]
    assert [span["loss"] for span in render({"messages": turns})] == [False, False, False, True]
    assert [(s["role"], s["loss"]) for s in render({"prompt": "p", "completion": "c"})] == [
        ("prompt", False),
        ("completion", True),
    ]
    assert render({"text": "x" * 5000})[0]["truncated"]
