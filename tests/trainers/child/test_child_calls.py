"""Calls of tools: templates that write arguments as JSON get objects, those that join texts get text, none loses a call."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders_llama import make_tokenizer
from builders_templates import TEMPLATES, tokenizer_of

from trainers.child.chat import CHATML
from trainers.child.data import IGNORED, encode_row, encode_rows
from trainers.child.failure import TrainFailure
from trainers.child.render import question, render

ARGUMENTS = {"city": "Zürich", "days": [1, 2.5]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def called(arguments: Any, content: str = "", name: str = "weather", id: str = "call_1") -> dict[str, Any]:
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def row_with(*calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    answers = [{"role": "tool", "content": "rain", "tool_call_id": "call_1", "name": "weather"}]
    last = {"role": "assistant", "content": "rain"}
    return {"messages": [{"role": "user", "content": "rain or weather?"}, *calls, *answers, last], **more}


def learned(row: dict[str, Any], tokenizer: Any) -> list[str]:
    runs: list[list[int]] = [[]]
    for label in encode_row(row, tokenizer).labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


WRITTEN = json.dumps(ARGUMENTS, ensure_ascii=False)
HERMES = f'<tool_call>\n{{"name": "weather", "arguments": {WRITTEN}}}\n</tool_call><|im_end|>'
LEARNED = {
    "qwen2.5": [HERMES, "rain<|im_end|>"],
    "qwen3": [HERMES, "<think>\n\n</think>\n\nrain<|im_end|>"],
    "llama3": [f'{{"name": "weather", "parameters": {WRITTEN}}}<|eot_id|>', "rain<|eot_id|>"],
    CHATML: [HERMES, "rain<|im_end|>"],
}


@pytest.mark.parametrize("arguments", [ARGUMENTS, WRITTEN, json.dumps(ARGUMENTS)], ids=["object", "text", "ascii"])
@pytest.mark.parametrize("name", LEARNED, ids=["qwen2.5", "qwen3", "llama3", "ours"])
def test_arguments_are_json_once(name: str, arguments: Any) -> None:
    assert learned(row_with(called(arguments), tools=TOOLS), tokenizer_of(name)) == LEARNED[name]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", CHATML], ids=["qwen2.5", "qwen3", "ours"])
def test_a_call_behind_words_in_an_earlier_turn(name: str) -> None:
    row = row_with(called(WRITTEN, content="weather?"))
    row["messages"] += [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": "weather?"}]
    tokenizer = tokenizer_of(name)
    first, second, third = learned(row, tokenizer)
    assert (first, second) == ("weather?\n" + HERMES, "rain<|im_end|>")
    assert third.removeprefix("<think>\n\n</think>\n\n") == "weather?<|im_end|>"
    row["messages"][1]["weight"] = 0
    assert learned(row, tokenizer) == [second, third]


def test_several_calls_of_one_turn() -> None:
    two = called(ARGUMENTS)
    two["tool_calls"] += called({}, name="rain")["tool_calls"]
    wanted = (
        HERMES.removesuffix("<|im_end|>") + '\n<tool_call>\n{"name": "rain", "arguments": {}}\n</tool_call><|im_end|>'
    )
    for name in ("qwen2.5", CHATML):
        assert learned(row_with(two), tokenizer_of(name))[0] == wanted


def test_a_template_that_joins_arguments_gets_text() -> None:
    tokenizer = tokenizer_of("r1")
    row = row_with({**called(ARGUMENTS), "weight": 0})
    assert "<｜tool▁sep｜>weather\n" + WRITTEN + "<｜tool▁calls▁end｜>" in render(row, tokenizer).text
    assert learned(row, tokenizer) == ["rain<｜end▁of▁sentence｜>"]


def test_a_template_that_asks_arguments_what_only_text_knows_gets_text() -> None:
    tokenizer = tokenizer_of("qwen2.5")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}({{ c.function.arguments.strip() }}){% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert f"weather({WRITTEN})" in render(row_with(called(WRITTEN)), tokenizer).text


def test_text_that_is_no_object_stays_as_it_is() -> None:
    rendered = render(row_with(called("[1]")), tokenizer_of("qwen2.5")).text
    assert '"arguments": "[1]"' in rendered


@pytest.mark.parametrize("name", ["gemma", "chatml"])
def test_a_template_that_does_not_show_calls_refuses_the_row(name: str) -> None:
    row = {"messages": [{"role": "user", "content": "weather"}, called(ARGUMENTS)]}
    with pytest.raises(TrainFailure, match=r"Row 2\b.*calls of tools") as caught:
        encode_rows([{"text": "a"}, row], tokenizer_of(name))
    assert caught.value.code == "row_not_renderable"


def test_a_call_of_nothing_refuses_the_row() -> None:
    """As older uploads may hold them."""
    for calls in ([{"id": "1"}], ["weather"]):
        row = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        }
        with pytest.raises(TrainFailure, match="no function with a name"):
            encode_row(row, tokenizer_of("qwen2.5"))


def test_our_own_template_shows_tools_and_their_answers() -> None:
    tokenizer = make_tokenizer(CHATML)
    row = row_with(called(ARGUMENTS), tools=TOOLS)
    row["messages"].insert(0, {"role": "system", "content": "Be short."})
    text = render(row, tokenizer).text
    assert text.startswith("<|im_start|>system\nBe short.\n\n# Tools") and text.count("Be short.") == 1
    assert json.dumps(TOOLS[0]) in text and "<|im_start|>tool\nrain<|im_end|>" in text
    without = render({"messages": row["messages"][1:]}, tokenizer).text
    assert without.startswith("<|im_start|>user\n") and "# Tools" not in without


def test_a_call_is_not_asked_for_in_words() -> None:
    row = {"messages": [{"role": "user", "content": "weather"}, called(ARGUMENTS)]}
    assert question(row, tokenizer_of("qwen2.5")) is None
    assert question({"messages": [{"role": "assistant", "content": "rain"}]}, tokenizer_of("qwen2.5")) is None
    asked = question(row_with(called(WRITTEN)), tokenizer_of("qwen2.5"))
    assert asked is not None and asked.expected == "rain" and WRITTEN in asked.prompt


def test_plain_rows_are_rendered_as_before() -> None:
    """What our own template makes of rows without tools is part of what a run follows from."""
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user", "assistant")]
    tokenizer = make_tokenizer(CHATML)
    plain = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in turns)
    assert render({"messages": turns}, tokenizer).text == plain
    tokenizer.eos_token = "<|endoftext|>"
    ended = plain.replace("assistant\na<|im_end|>", "assistant\na<|im_end|><|endoftext|>")
    assert render({"messages": turns}, tokenizer).text == ended
    assert TEMPLATES["chatml"] != CHATML
