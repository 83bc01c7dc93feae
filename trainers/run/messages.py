"""What a child says is hostile until it was checked: types, finite numbers of at most 64 bits, no NUL characters and no
half surrogate pairs (PostgreSQL has none)."""

from __future__ import annotations

import math
from typing import Any

from cluster.errors import JobFailure

NUMBER = (int, float)
MAX_ACTION = 3
"""Of `trainers.child.control`."""
MAX_INTEGER = 2**63 - 1
_Types = type | tuple[type, ...]

FIELDS: dict[str, dict[str, _Types]] = {
    "hello": {},
    "progress": {"what": str, "done": int, "total": int},
    "ready": {"steps": int, "start_step": int},
    "evaluated": {"step": int, "when": str},
    "step": {
        "step": int,
        "epoch": NUMBER,
        "loss": NUMBER,
        "lr": NUMBER,
        "grad_norm": NUMBER,
        "tokens": int,
        "seconds": NUMBER,
    },
    "checkpoint": {"step": int, "path": str, "sha256": dict, "metrics": dict},
    "ack": {"id": int, "command": str, "state": str},
    "release": {"action": int},
    "log": {"level": str, "message": str},
    "failed": {"code": str, "message": str},
    "finished": {"step": int, "artifact": str, "sha256": dict, "metrics": dict},
}
"""Message type → the fields that must be there, with their types."""


def checked(message: Any) -> dict[str, Any]:
    """The message, cleaned. Raises `JobFailure` (`protocol_violation`)."""
    if not isinstance(message, dict) or message.get("type") not in FIELDS:
        raise _violation("it sent a message of no known type")
    kind = message["type"]
    for name, types in FIELDS[kind].items():
        if not isinstance(message.get(name), types) or isinstance(message[name], bool):
            raise _violation(f"its message {kind} has no proper {name}")
    cleaned: dict[str, Any] = _clean(message, kind)
    if kind in ("checkpoint", "finished"):
        _check_hashes(cleaned["sha256"], kind)
    if kind == "release" and not 0 <= cleaned["action"] <= MAX_ACTION:
        raise _violation("its message release has no proper action")
    return cleaned


def _check_hashes(hashes: dict[str, Any], kind: str) -> None:
    if not hashes or not all(isinstance(value, str) and len(value) == 64 for value in hashes.values()):
        raise _violation(f"its message {kind} does not name its files with their sha256")


def _clean(value: Any, kind: str) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise _violation(f"its message {kind} has a whole number of more than 64 bits")
    if isinstance(value, float) and not math.isfinite(value):
        raise _violation(f"its message {kind} has a number that is not finite")
    if isinstance(value, dict):
        return {_clean(key, kind): _clean(item, kind) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, kind) for item in value]
    return value


def _violation(what: str) -> JobFailure:
    return JobFailure(
        f"the training process broke the protocol with its supervisor: {what}",
        code="protocol_violation",
        hint="Training code must leave the control socket alone.",
    )
