"""Idempotency keys: key and object are written in one transaction, and a duplicate gets the first answer.

Only answers of requests that made something are kept (24 h): what failed made nothing, and may be sent again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app.db.models import IdempotencyKey
from cluster.errors import InvalidRequest

KEPT = timedelta(hours=24)
MAX_KEY_CHARS = 255


@dataclass(frozen=True)
class RequestKey:
    """`key`: the Idempotency-Key header, None when there is none. `body`: as parsed, so that spelling does not
    matter."""

    tenant: str
    route: str
    key: str | None
    body: Any
    token_id: str = ""


@dataclass
class Once:
    """`replay`: the first answer; then do nothing. Else do the work and set `answer`."""

    replay: dict[str, Any] | None = None
    status: int = 0
    response: dict[str, Any] | None = None

    def answer(self, status: int, response: dict[str, Any]) -> None:
        self.status, self.response = status, response


@contextmanager
def idempotent(session: Session, request: RequestKey) -> Iterator[Once]:
    """Within the transaction of the object that is made. A duplicate waits here until the first one has ended: it
    finds its answer, or, when that one failed, takes its turn. Raises `InvalidRequest` for the same key with another
    body."""
    if request.key is None:
        yield Once()
        return
    _check(request.key)
    if not _insert(session, request):
        yield _first_answer(session, request)
        return
    once = Once()
    yield once
    if once.response is None:
        raise ValueError(f"{request.route} ended without an answer to keep")
    session.execute(
        update(IdempotencyKey)
        .where(*_row(request))
        .values(status=once.status, response=once.response)
        .execution_options(synchronize_session=False)
    )


def _insert(session: Session, request: RequestKey) -> bool:
    """Whether we are the first. The primary key makes the others wait for our transaction."""
    row: dict[str, Any] = {
        "tenant_id": request.tenant,
        "route": request.route,
        "key": request.key,
        "body_sha256": _sha256(request.body),
        "token_sha256": hashlib.sha256(request.token_id.encode()).hexdigest(),
        "status": 0,
        "response": {},
        "delivered": False,
        "created_at": func.clock_timestamp(),
    }
    statement = insert(IdempotencyKey).values(**row)
    renewed = statement.on_conflict_do_update(
        index_elements=["tenant_id", "route", "key"],
        set_={name: statement.excluded[name] for name in row if name not in ("tenant_id", "route", "key")},
        where=IdempotencyKey.created_at < func.now() - KEPT,
    )
    return session.execute(renewed.returning(IdempotencyKey.key)).one_or_none() is not None


def _first_answer(session: Session, request: RequestKey) -> Once:
    row = session.scalars(select(IdempotencyKey).where(*_row(request))).one()
    if row.body_sha256 != _sha256(request.body):
        raise InvalidRequest(
            "this Idempotency-Key was used for another request",
            code="idempotency_key_reused",
            param="Idempotency-Key",
            hint="Use a new key for each new request, and the same key only to send the same one again.",
        )
    return Once(replay=row.response, status=row.status, response=row.response)


def _row(request: RequestKey) -> tuple[Any, ...]:
    return (
        IdempotencyKey.tenant_id == request.tenant,
        IdempotencyKey.route == request.route,
        IdempotencyKey.key == request.key,
    )


def _check(key: str) -> None:
    if not 1 <= len(key) <= MAX_KEY_CHARS or not key.isprintable():
        raise InvalidRequest(
            "the Idempotency-Key is empty, too long or not printable",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
            hint=f"1 to {MAX_KEY_CHARS} printable characters; a UUID will do.",
        )


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
