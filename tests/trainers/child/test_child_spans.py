"""Under chat templates that rewrite earlier turns: each answer and its end carry loss, at their own place, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from builders_templates import ENDS, TEMPLATES, tokenizer_of
from hypothesis import given
from hypothesis import strategies as st

from trainers.child.data import IGNORED, encode_row, encode_rows
from trainers.child.failure import TrainFailure
from trainers.child.render import render

TOKENIZERS = {name: tokenizer_of(name) for name in TEMPLATES}
BEFORE = {"qwen3": "<think>\n\n</think>\n\n", "mistral": " "}
"""What the model writes before its last answer."""


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def learned(row: dict[str, Any], tokenizer: Any) -> list[str]:
    """The text of each run of tokens that carry loss; not what follows from their order alone: the ids are the whole text's."""
    example = encode_row(row, tokenizer)
    assert example.ids == tokenizer(render(row, tokenizer).text, add_special_tokens=False)["input_ids"]
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def expected(name: str, turns: list[dict[str, Any]]) -> list[str]:
    found = []
    for index, one in enumerate(turns):
        if one["role"] == "assistant" and one.get("weight", 1) != 0:
            last = index + 1 == len(turns)
            end = "<|return|>" if name == "gpt-oss" and last else ENDS.get(name, "<|im_end|>")
            before = "<|channel|>final<|message|>" if name == "gpt-oss" else BEFORE.get(name, "")
            kept = one["content"].split("</think>")[-1] if name in ("qwen3", "r1") else one["content"]
            found.append((before if last or name != "qwen3" else "") + kept + end)
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_the_question_says_already(name: str) -> None:
    turns = [turn("user", "is it yes or no? say yes."), turn("assistant", "yes")]
    turns += [turn("user", "yes or no? no"), turn("assistant", "no"), turn("user", "yes?"), turn("assistant", "yes")]
    assert learned({"messages": turns}, TOKENIZERS[name]) == expected(name, turns)
    asked = [turn("system", "say yes or no"), *turns]
    assert learned({"messages": asked}, TOKENIZERS[name]) == expected(name, asked)
    turns[1]["weight"] = 0
    assert learned({"messages": turns}, TOKENIZERS[name]) == expected(name, turns)


words = st.text("ab?\n", min_size=1, max_size=4).map(str.strip).filter(bool)
weights = st.sampled_from([0, 1])


@pytest.mark.parametrize("name", TEMPLATES)
@given(said=st.lists(st.tuples(words, words, weights), min_size=1, max_size=4), system=st.none() | words)
def test_whatever_is_said(name: str, said: list[tuple[str, str, int]], system: str | None) -> None:
    turns = [] if system is None else [turn("system", system)]
    for question, answer, weight in said:
        turns += [turn("user", question), turn("assistant", answer, weight=weight)]
    assert learned({"messages": turns}, TOKENIZERS[name]) == expected(name, turns)


@pytest.mark.parametrize("name", ["qwen3", "r1"])
@given(said=st.lists(st.tuples(words, words, words), min_size=2, max_size=3))
def test_a_thought_that_is_cut_off_is_not_missed(name: str, said: list[tuple[str, str, str]]) -> None:
    turns = []
    for question, thought, answer in said:
        turns += [turn("user", question), turn("assistant", f"<think>\n{thought}\n</think>{answer}")]
    found = learned({"messages": turns}, TOKENIZERS[name])
    wanted = expected(name, turns)
    if name == "qwen3":  # of the last turn it is kept
        wanted[-1] = wanted[-1].replace("<think>\n\n", f"<think>\n{said[-1][1]}\n")
    assert found == wanted


def test_turns_that_follow_each_other_and_one_that_comes_first() -> None:
    turns = [turn("assistant", "a"), turn("user", "a"), turn("assistant", "a"), turn("assistant", "b")]
    assert learned({"messages": turns}, TOKENIZERS["chatml"]) == ["a<|im_end|>", "a<|im_end|>", "b<|im_end|>"]


def test_what_makes_a_template_take_a_text_for_something_else() -> None:
    """Qwen3 looks at how a question begins and ends, so that no mark may stand there."""
    turns = [turn("user", "a"), turn("assistant", "a"), turn("user", "<tool_response>a</tool_response>")]
    turns += [turn("assistant", "a"), turn("user", "b"), turn("assistant", "a")]
    wanted = ["a<|im_end|>", "a<|im_end|>", "<think>\n\n</think>\n\na<|im_end|>"]
    assert learned({"messages": turns}, TOKENIZERS["qwen3"]) == wanted


def test_an_answer_without_words_is_passed_over() -> None:
    turns = [turn("user", "a"), turn("assistant", " "), turn("user", "a"), turn("assistant", "a")]
    assert learned({"messages": turns}, TOKENIZERS["r1"]) == ["a<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",  # says nothing of earlier ones
        "{% for m in messages %}{{ m.content if loop.last else '[' + m.content * 2 + ']' }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper if not loop.last else m.content + '.' }}{{ m.content | length }}{% endfor %}",
    ],
)
def test_a_turn_that_cannot_be_found_refuses_the_row_by_its_number(template: str) -> None:
    turns = [turn("user", "secret"), turn("assistant", "secret"), turn("user", "b"), turn("assistant", "c")]
    rows = [{"text": "a"}, {"messages": turns}]
    with pytest.raises(TrainFailure, match=r"[Rr]ow 2\b.*turn 2") as caught:
        encode_rows(rows, tokenizer_of(template))
    assert caught.value.code == "row_not_renderable" and "secret" not in caught.value.message
