"""Code as users see it: the files that jobs of method `custom` run."""

from __future__ import annotations

from typing import Literal

from app.schemas.common import Answer


class Code(Answer):
    """One version of a tenant's code. `ref` is what requests may use; `files`: name → sha256 (of one that is asked for)."""

    id: str
    object: Literal["code"] = "code"
    name: str
    version: int
    ref: str
    status: Literal["ready"] = "ready"
    bytes: int
    file_count: int
    sha256: str
    source_sha256: str
    files: dict[str, str] | None = None
    created_at: int
