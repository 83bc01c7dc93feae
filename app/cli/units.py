"""Numbers as people read them, and text as options mean it."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cluster.errors import InvalidRequest

BARS = "▁▂▃▄▅▆▇█"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def ago(moment: Any, now: float | None = None) -> str:
    """A time as its distance from now. Takes Unix seconds or ISO 8601."""
    seconds = unix(moment)
    if seconds is None:
        return "–"
    past = (time.time() if now is None else now) - seconds
    return f"{span(past)} ago" if past >= 0 else f"in {span(-past)}"


def unix(moment: Any) -> float | None:
    if isinstance(moment, int | float):
        return float(moment)
    if isinstance(moment, str):
        stamp = datetime.fromisoformat(moment)
        return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()
    return None


def clock(moment: Any) -> str:
    """Local time of day."""
    seconds = unix(moment)
    return "--:--:--" if seconds is None else time.strftime("%H:%M:%S", time.localtime(seconds))


def span(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    return f"{whole / 3600:.1f} h" if whole < 172800 else f"{whole / 86400:.1f} d"


def size(count: Any) -> str:
    if not isinstance(count, int | float):
        return "–"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The last values, the mean of neighbours where there are more than `width`."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if not finite:
        return ""
    width = min(width, len(finite))
    parts = [finite[len(finite) * i // width : len(finite) * (i + 1) // width] for i in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def seconds_of(text: str, option: str) -> float:
    """`90`, `30m`, `24h`, `7d`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise InvalidRequest(f"{option} {text!r} is not a duration", param=option, hint="write 90, 30m, 24h or 7d")
    return float(match[1]) * SECONDS[match[2]]


def scalar(text: str) -> Any:
    """The value of `key=value`: a number, true, false, null, a JSON list or object, else the text itself."""
    for parse in (json.loads, float):
        try:
            value = parse(text)
        except ValueError:
            continue
        # `nan` and `inf` are words here: JSON could not carry them.
        return value if not isinstance(value, float) or math.isfinite(value) else text
    return text


def assignments(items: Sequence[str], option: str) -> dict[str, str]:
    """`key=value`, given once or more."""
    found: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key.strip():
            raise InvalidRequest(
                f"{option} {item!r} is not key=value", param=option, hint=f"for instance {option} key=value"
            )
        found[key.strip()] = value
    return found
