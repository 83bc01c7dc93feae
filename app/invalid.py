"""What pydantic finds wrong with a request, in our words: the field as the user wrote it, and what to send instead.

Values that were sent are never repeated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from app.schemas.common import NAME_PATTERN, NAME_RULE, did_you_mean
from cluster.errors import HeliostatError, InvalidRequest

CODES = {"missing": "missing_field", "unknown_key": "unknown_field", "json_invalid": "invalid_json"}
PLACES = ("body", "query", "path", "header")
BRANCH = re.compile(r"int|str|float|bool|.*[\[(].*", re.DOTALL)
"""What pydantic puts into a path for the branch of a union; no field of ours is called so."""
RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
NUMBERS = ("int_type", "int_from_float", "float_type", "int_parsing", "float_parsing")
HINTS = {
    "missing": "Add it; /docs shows the whole body.",
    "string_type": "Send text, in double quotes.",
    "bool_type": "Send true or false, without quotes.",
    "list_type": "Send a list, in [ ].",
    "conflicting_keys": "Give it once: the two are names for the same.",
    "nul": "Remove the NUL character.",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "Send an object, in { }."),
    **dict.fromkeys(RANGES, "Send a number in this range, or leave the field out for the default."),
    **dict.fromkeys(NUMBERS, "Send a plain number, without quotes; a whole one where a whole one is asked for."),
}
ELSE = "See /docs for what the field takes."


def told_of(problems: Sequence[Any]) -> HeliostatError:
    """The first problem as an error of the house; `problems` as pydantic lists them."""
    first = problems[0]
    context: Mapping[str, Any] = first.get("ctx") or {}
    code = CODES.get(first["type"], "invalid_value")
    if code == "invalid_json":
        return InvalidRequest(
            f"the body is not JSON: {context['error']} at character {first['loc'][-1]}",
            code=code,
            hint="Send a JSON object, with the header `content-type: application/json`.",
        )
    param = _param(first["loc"], context)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return InvalidRequest(
        f"{param or 'the body'}: {first['msg']}{more}", code=code, param=param, hint=_hint(first, context)
    )


def _param(loc: Sequence[Any], context: Mapping[str, Any]) -> str | None:
    parts = [str(part) for part in loc[loc[0] in PLACES :]]
    own = [part for number, part in enumerate(parts) if number == 0 or not BRANCH.fullmatch(part)]
    return ".".join([*own, *([context["key"]] if "key" in context else [])]) or None


def _hint(problem: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    if "hint" in context:
        return str(context["hint"])
    if problem["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        given = problem["input"]
        near = did_you_mean(given, known) if isinstance(given, str) else None
        return near or f"One of: {', '.join(known)}."
    if problem["type"] == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"It takes {NAME_RULE}." if pattern == NAME_PATTERN else f"It must match {pattern}."
    return HINTS.get(problem["type"], ELSE)
