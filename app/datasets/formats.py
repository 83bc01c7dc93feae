"""Row formats: which one a row has (decided by its set of keys), and its canonical form. Pure.

Canonical: {"messages"} | {"prompt","completion"} | {"text"} | {"text","label"} | {"prompt","chosen","rejected"}."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from typing import Any

from app.datasets.messages import chat, conversation, plain_text
from app.datasets.problems import BadRow

Row = dict[str, Any]


class Format(StrEnum):
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    PREFERENCE_OPENAI = "preference_openai"
    PREFERENCE = "preference"
    PROMPT_COMPLETION = "prompt_completion"
    ALPACA = "alpaca"
    TEXT_LABEL = "text_label"
    TEXT = "text"


# Most telling first: an Alpaca row may carry a `text` too. (needed keys, keys that are used when there)
KEYS: dict[Format, tuple[frozenset[str], frozenset[str]]] = {
    Format.MESSAGES: (frozenset({"messages"}), frozenset({"tools"})),
    Format.SHAREGPT: (frozenset({"conversations"}), frozenset({"system", "tools"})),
    Format.PREFERENCE_OPENAI: (frozenset({"input", "preferred_output", "non_preferred_output"}), frozenset()),
    Format.PREFERENCE: (frozenset({"chosen", "rejected"}), frozenset({"prompt"})),
    Format.PROMPT_COMPLETION: (frozenset({"prompt", "completion"}), frozenset()),
    Format.ALPACA: (frozenset({"instruction", "output"}), frozenset({"input", "system"})),
    Format.TEXT_LABEL: (frozenset({"text", "label"}), frozenset()),
    Format.TEXT: (frozenset({"text"}), frozenset()),
}
FIELDS = frozenset().union(*(needed | used for needed, used in KEYS.values()))
EXPECTED = (
    "messages; prompt and completion; text; text and label; instruction (input) output; conversations; "
    "prompt, chosen and rejected"
)


def task_of(format: Format) -> str:
    """What a dataset of this format can train."""
    if format in (Format.PREFERENCE, Format.PREFERENCE_OPENAI):
        return "preference"
    return "sequence_classification" if format is Format.TEXT_LABEL else "causal_lm"


def detect(row: Row) -> Format:
    """Raises `BadRow` when the keys are those of no format."""
    keys = {key for key, value in row.items() if value is not None}
    for format, (needed, _) in KEYS.items():
        if needed <= keys:
            return format
    raise BadRow(f"its keys are those of no known format{_meant(_looked_at(keys))}; known are: {EXPECTED}")


def _looked_at(keys: set[str]) -> frozenset[str]:
    """A few, and of each the beginning: the search below is slow, and a file may have a million rows like this."""
    return frozenset(key[:40] for key in sorted(keys)[:20])


@lru_cache(maxsize=128)
def _meant(keys: frozenset[str]) -> str:
    """Only our own names are shown: a key of the user's may hold data."""
    near = {field for key in keys for field in difflib.get_close_matches(key, FIELDS - keys, n=1, cutoff=0.75)}
    return f" (did you mean {', '.join(sorted(near))}?)" if near else ""


def unused(row: Row, format: Format) -> set[str]:
    needed, used = KEYS[format]
    return set(row) - needed - used


def canonical(row: Row, format: Format) -> Row:
    """Raises `BadRow`."""
    missing = sorted(key for key in KEYS[format][0] if row.get(key) is None)
    if missing:
        raise BadRow(f"it lacks {' and '.join(missing)}, which the first row has")
    return _CONVERT[format](row)


def _messages(row: Row) -> Row:
    return _with_tools(row, chat(row["messages"]))


def _sharegpt(row: Row) -> Row:
    turns = conversation(row["conversations"])
    if row.get("system") is not None:
        turns = [{"role": "system", "content": plain_text(row["system"], "system")}, *turns]
    return _with_tools(row, chat(turns))


def _with_tools(row: Row, messages: list[Row]) -> Row:
    tools = row.get("tools")
    if not tools:
        return {"messages": messages}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools is not a list of objects")
    return {"messages": messages, "tools": tools}


def _prompt_completion(row: Row) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = chat(prompt, answers=False)
        return {"messages": [*(_unlearned(turn) for turn in before), *chat(completion)]}
    if isinstance(prompt, list) or isinstance(completion, list):
        raise BadRow("prompt and completion must both be text or both be messages")
    return {"prompt": plain_text(prompt, "prompt"), "completion": _some_text(completion, "completion")}


def _unlearned(turn: Row) -> Row:
    """An assistant's turn inside the prompt has no loss."""
    return {**turn, "weight": 0} if turn["role"] == "assistant" else turn


def _alpaca(row: Row) -> Row:
    question = _some_text(row["instruction"], "instruction")
    extra = plain_text(row.get("input") or "", "input")
    turns = [
        {"role": "user", "content": f"{question}\n\n{extra}" if extra else question},
        {"role": "assistant", "content": _some_text(row["output"], "output")},
    ]
    if row.get("system"):
        turns.insert(0, {"role": "system", "content": plain_text(row["system"], "system")})
    return {"messages": turns}


def _text(row: Row) -> Row:
    return {"text": _some_text(row["text"], "text")}


def _text_label(row: Row) -> Row:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise BadRow("label is neither text nor a whole number")
    return {"text": _some_text(row["text"], "text"), "label": label}


def _preference_openai(row: Row) -> Row:
    source = row["input"]
    if not isinstance(source, dict) or "messages" not in source:
        raise BadRow("input is not an object with messages")
    return {
        "prompt": chat(source["messages"], answers=False),
        "chosen": chat(row["preferred_output"]),
        "rejected": chat(row["non_preferred_output"]),
    }


def _preference(row: Row) -> Row:
    parts = {key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    if len({isinstance(part, list) for part in parts.values()}) != 1:
        raise BadRow("prompt, chosen and rejected must all be text or all be messages")
    if isinstance(row["chosen"], list):
        return {key: chat(part, answers=key != "prompt") for key, part in parts.items()}
    return {key: _some_text(part, key) for key, part in parts.items()}


def _some_text(value: Any, field: str) -> str:
    text = plain_text(value, field)
    if not text.strip():
        raise BadRow(f"{field} is empty")
    return text


_CONVERT: dict[Format, Callable[[Row], Row]] = {
    Format.MESSAGES: _messages,
    Format.SHAREGPT: _sharegpt,
    Format.PREFERENCE_OPENAI: _preference_openai,
    Format.PREFERENCE: _preference,
    Format.PROMPT_COMPLETION: _prompt_completion,
    Format.ALPACA: _alpaca,
    Format.TEXT_LABEL: _text_label,
    Format.TEXT: _text,
}
