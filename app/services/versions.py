"""Versions of a name, whatever they are of: stored together with their files, and kept while a job needs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app.db.models import Code, Dataset, Job
from app.db.repository import Repository
from app.services.parts import Parts
from cluster.core.job import TERMINAL
from cluster.errors import Conflict

V = TypeVar("V", Dataset, Code)


def store(parts: Parts, row: V, content: Callable[[V], Any], put: Callable[[str], None]) -> tuple[V, bool]:
    """(the version, whether it is new); the newest one of the name is the answer where it has the same content. Objects first (`put`
    is told below which prefix), then the row that names them: a row never points at nothing."""
    new = False
    try:
        with parts.database.tenant(row.tenant_id) as session:
            there = Repository(session, row.tenant_id).same_version(row, content)
        if there is None:
            put(prefix_of(row))
            with parts.database.tenant(row.tenant_id) as session:
                there = Repository(session, row.tenant_id).add_version(row, content)
        new = there is row
        return there, new
    finally:
        if not new:
            parts.storage.delete_prefix(prefix_of(row))


def prefix_of(row: Dataset | Code) -> str:
    """Where its files lie in storage."""
    return f"tenants/{row.tenant_id}/{row.__tablename__}/{row.id}"


def refuse_used(session: Session, what: str, by: ColumnElement[bool]) -> None:
    """`by`: which jobs need it. Raises `Conflict` when one of them has not ended."""
    living = Job.state.not_in([str(state) for state in TERMINAL])
    user = session.scalar(select(Job.id).where(by, living).limit(1))
    if user is not None:
        raise Conflict(
            f"job {user} still needs this {what}",
            code=f"{what}_in_use",
            hint="Cancel the job, or wait for its end.",
        )
