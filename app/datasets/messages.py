"""Chat turns: what a valid one is, and the one form they are stored in. Pure. Raises `BadRow` for the rest."""

from __future__ import annotations

from typing import Any

import orjson

from app.datasets.problems import BadRow

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {  # ShareGPT's `from`
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
KEPT = ("name", "tool_calls", "tool_call_id")


def plain_text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} is not text")
    return value


def chat(turns: Any, *, answers: bool = True) -> list[dict[str, Any]]:
    """`answers`: at least one assistant turn must have a loss."""
    if not isinstance(turns, list) or not turns:
        raise BadRow("messages is not a list with at least one turn")
    stored = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    if answers and not any(has_loss(turn) for turn in stored):
        raise BadRow("no assistant turn has a weight above 0 and content, so nothing would be learned from it")
    return stored


def has_loss(turn: dict[str, Any]) -> bool:
    return (
        turn["role"] == "assistant" and turn.get("weight", 1) != 0 and bool(turn["content"] or turn.get("tool_calls"))
    )


def conversation(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT turns {"from","value"} as messages."""
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations is not a list with at least one turn")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
            raise BadRow(f"turn {number} has no `from`")
        role = SPEAKERS.get(turn["from"].lower())
        if role is None:
            raise BadRow(f"turn {number} has an unknown `from`; known are {', '.join(sorted(SPEAKERS))}")
        weight = {"weight": turn["weight"]} if turn.get("weight") is not None else {}
        messages.append({"role": role, "content": turn.get("value"), **weight})
    return messages


def _turn(turn: Any, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is not an object")
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"turn {number} has no role of {', '.join(ROLES)}")
    kept = {key: turn[key] for key in KEPT if turn.get(key) is not None}
    _check_calls(kept.get("tool_calls", []), number)
    stored = {"role": role, "content": _content(turn.get("content"), number, bool(kept.get("tool_calls"))), **kept}
    weight = turn.get("weight")
    if weight is None:
        return stored
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f"turn {number} has a weight other than 0 and 1")
    return {**stored, "weight": int(weight)}


def _check_calls(calls: Any, number: int) -> None:
    """OpenAI's form. Arguments stay as they are, an object or its JSON: the training gives each chat template what it takes."""
    if not isinstance(calls, list):
        raise BadRow(f"turn {number} has tool_calls that are not a list")
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"turn {number} has a tool call without the name of a function")
        if not _is_object(function.get("arguments", {})):
            raise BadRow(f"turn {number} has a tool call whose arguments are not a JSON object")


def _is_object(arguments: Any) -> bool:
    if not isinstance(arguments, str):
        return isinstance(arguments, dict)
    try:
        return isinstance(orjson.loads(arguments), dict)
    except orjson.JSONDecodeError:
        return False


def _content(content: Any, number: int, may_lack: bool) -> str:
    """Text, or OpenAI's list of text parts joined."""
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if not isinstance(content, list):
        raise BadRow(f"turn {number} has no text content")
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise BadRow(f"turn {number} has content parts other than text")
    return "".join(part for part in parts if part is not None)
