"""What all bodies share: strictness with "did you mean", synonyms, the error body, pages, and kinds of text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

T = TypeVar("T")
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
NAME_RULE = "1 to 64 of a–z, 0–9, '.', '_' and '-', the first a letter or digit"
LABEL_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?$"


def _storable(text: str) -> str:
    """PostgreSQL keeps no NUL."""
    if "\0" in text:
        raise PydanticCustomError("nul", "a NUL character is not allowed")
    return text


MAX_JSON_CHARS = 16_000


def small_json(value: dict[str, Any]) -> dict[str, Any]:
    """Free-form, within bounds: it travels in an environment variable."""
    if len(json.dumps(value)) > MAX_JSON_CHARS:
        raise PydanticCustomError("too_large_json", f"it has more than {MAX_JSON_CHARS} characters as JSON")
    return value


Text = Annotated[str, AfterValidator(_storable)]
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Reference = Annotated[Text, Field(min_length=1, max_length=200)]
"""An id, a name, or name@version."""


class RequestBody(BaseModel):
    """Unknown keys are refused with what may have been meant; synonyms become the one name."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    SYNONYMS: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        renamed: dict[str, Any] = {}
        for given, value in data.items():
            key = cls.SYNONYMS.get(given, given)
            if key not in cls.model_fields:
                raise _unknown(str(given), [*cls.model_fields, *cls.SYNONYMS])
            if key in renamed and renamed[key] != value:
                raise PydanticCustomError("conflicting_keys", "given twice with different values", {"key": given})
            renamed[key] = value
        return renamed


def did_you_mean(given: str, known: Collection[str]) -> str | None:
    """A hint. Only the first 100 characters are looked at: the search is slow on long texts."""
    near = difflib.get_close_matches(given[:100], known, n=1, cutoff=0.6)
    return f"Did you mean `{near[0]}`?" if near else None


def _unknown(key: str, known: list[str]) -> PydanticCustomError:
    hint = did_you_mean(key, known) or f"Known here: {', '.join(sorted(known))}."
    return PydanticCustomError("unknown_key", "unknown key", {"key": key[:100], "hint": hint})


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(extra="forbid")


class Page(Answer, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str
    hint: str | None
    request_id: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class Deleted(Answer):
    id: str
    object: str
    deleted: Literal[True] = True
