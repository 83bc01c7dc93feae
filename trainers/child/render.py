"""From a canonical row to text with the spans that carry loss. Pure: needs a tokenizer only for its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% if message['role'] == 'assistant' and eos_token and eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For a base model without a chat template. The end-of-text token after an assistant turn lets generation stop where the
tokenizer does not know <|im_end|>."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """`spans`: (start, end) in characters of `text` that carry loss. `templated`: the text has its special tokens already."""

    text: str
    spans: list[tuple[int, int]]
    templated: bool


@dataclass(frozen=True)
class Question:
    """A row as a question with one right answer; both as text. `templated` as in `Rendered`."""

    prompt: str
    expected: str
    templated: bool


def render(row: Row, tokenizer: Any) -> Rendered:
    """Raises ValueError for a row in no canonical format."""
    if "messages" in row:
        return _render_messages(row, tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = str(row["prompt"]), str(row["completion"])
        return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))], False)
    if "text" in row:
        text = str(row["text"])
        return Rendered(text, [(0, len(text))], False)
    raise ValueError(f"a row has the keys {sorted(row)}, not messages, prompt and completion, or text")


def question(row: Row, tokenizer: Any) -> Question | None:
    """The row's last answer asked for anew; None for rows without one."""
    if "prompt" in row and "completion" in row:
        return Question(str(row["prompt"]), str(row["completion"]), False)
    messages = row.get("messages") or []
    if not messages or messages[-1]["role"] != "assistant" or not isinstance(messages[-1].get("content"), str):
        return None
    return Question(template(row, messages[:-1], tokenizer, ask=True), messages[-1]["content"], True)


def template(row: Row, messages: list[dict[str, Any]], tokenizer: Any, *, ask: bool = False) -> str:
    """`ask`: with the beginning of an assistant's turn at the end."""
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    text: str = tokenizer.apply_chat_template(plain, tools=row.get("tools"), tokenize=False, add_generation_prompt=ask)
    return text


def _render_messages(row: Row, tokenizer: Any) -> Rendered:
    messages = list(row["messages"])
    whole = template(row, messages, tokenizer)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _turn(row, messages, index, tokenizer, whole)
        if span is None:
            span = _content(whole, message, spans[-1][1] if spans else 0)
        if span is not None and message.get("weight", 1) != 0:
            spans.append(span)
    return Rendered(whole, spans, True)


def _turn(row: Row, messages: list[dict[str, Any]], index: int, tokenizer: Any, whole: str) -> tuple[int, int] | None:
    """Where the assistant's turn lies, end-of-turn token included: what the template adds for it to the turns before.
    None where the template rewrites earlier turns."""
    if index == 0:
        return None  # many templates refuse to render no message at all
    before = template(row, messages[:index], tokenizer, ask=True)
    last = index + 1 == len(messages)
    after = (whole if last else template(row, messages[: index + 1], tokenizer)).rstrip()
    if not whole.startswith(after) or not after.startswith(before):
        return None
    return len(before), len(after)


def _content(whole: str, message: Mapping[str, Any], start: int) -> tuple[int, int] | None:
    """Where the turn's words lie in the text, without what ends the turn."""
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return None
    found = whole.find(content.strip(), start)
    return None if found < 0 else (found, found + len(content.strip()))
