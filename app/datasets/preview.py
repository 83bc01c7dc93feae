"""How a canonical row will look and where its loss lies, by spans of text; no tokenizer, no chat template. Pure."""

from __future__ import annotations

import json
from typing import Any

from app.datasets.messages import has_loss

SHOWN_CHARS = 2000


def render(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Spans in reading order: {"role", "text", "loss", "truncated"}."""
    if "messages" in row:
        return [_span(turn["role"], _spoken(turn), has_loss(turn)) for turn in row["messages"]]
    if "chosen" in row:
        return [span for key in ("prompt", "chosen", "rejected") if key in row for span in _side(key, row[key])]
    if "completion" in row:
        return [_span("prompt", row["prompt"], False), _span("completion", row["completion"], True)]
    if "label" in row:
        return [_span("text", row["text"], False), _span("label", str(row["label"]), True)]
    return [_span("text", row["text"], True)]


def _side(key: str, value: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    text = value if isinstance(value, str) else "\n".join(f"{turn['role']}: {_spoken(turn)}" for turn in value)
    return [_span(key, text, key != "prompt")]


def _spoken(turn: dict[str, Any]) -> str:
    calls = turn.get("tool_calls")
    return f"{turn['content']}{json.dumps(calls, ensure_ascii=False)}" if calls else turn["content"]


def _span(role: str, text: str, loss: bool) -> dict[str, Any]:
    return {"role": role, "text": text[:SHOWN_CHARS], "loss": loss, "truncated": len(text) > SHOWN_CHARS}


def chars(row: dict[str, Any]) -> int:
    """Characters of a row that become tokens."""
    if "messages" in row:
        return sum(len(_spoken(turn)) for turn in row["messages"])
    sides = [value for key, value in row.items() if key not in ("label", "tools")]
    return sum(len(side) if isinstance(side, str) else sum(len(_spoken(turn)) for turn in side) for side in sides)
