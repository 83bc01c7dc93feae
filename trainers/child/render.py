"""From a canonical row to text with the spans that carry loss. Pure: needs a tokenizer only for its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainers.child.chat import Chat
from trainers.child.failure import TrainFailure
from trainers.child.spans import Unplaced, spans_of

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
    """Raises ValueError for a row in no canonical format, TrainFailure where a turn that is to be learned cannot be found."""
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
    """The row's last answer asked for anew; None for rows without one in words, or with nothing that asks for it."""
    if "prompt" in row and "completion" in row:
        return Question(str(row["prompt"]), str(row["completion"]), False)
    messages = row.get("messages") or []
    last = messages[-1] if len(messages) > 1 else {}
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
        return None
    chat = Chat.of(row, tokenizer)
    return Question(chat.show(chat.turns[:-1], ask=True), last["content"], True)


def _render_messages(row: Row, tokenizer: Any) -> Rendered:
    chat = Chat.of(row, tokenizer)
    try:
        spans = spans_of(chat, [turn.get("weight", 1) for turn in row["messages"]])
    except Unplaced as error:
        hint = "Give turns that need not be learned weight 0, or use a base model with another chat template."
        raise TrainFailure("row_not_renderable", f"The chat template refuses a row: {error}.", hint=hint) from error
    return Rendered(chat.whole, spans, True)
