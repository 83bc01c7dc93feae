"""Pages over lists that are short by nature."""

from __future__ import annotations

from typing import Any

from app.db.repository import PageRequest
from app.schemas.common import Page
from cluster.errors import InvalidRequest


def paged(rows: list[dict[str, Any]], request: PageRequest) -> Page[dict[str, Any]]:
    """Raises `InvalidRequest` for a cursor that names nothing."""
    start = 0
    if request.after is not None:
        ids = [row["id"] for row in rows]
        if request.after not in ids:
            raise InvalidRequest(
                f"after={request.after[:80]!r} is not the id of one of these",
                code="invalid_cursor",
                param="after",
                hint="Send the id of the last object of the page before.",
            )
        start = ids.index(request.after) + 1
    end = start + request.limit
    return Page(data=rows[start:end], has_more=len(rows) > end)
