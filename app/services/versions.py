"""Versions of a name, whatever they are of: stored together with their files, and kept while a job needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app.db.models import Code, Dataset, Job
from app.db.repository import Repository
from app.services.parts import Parts
from cluster.core.job import TERMINAL
from cluster.errors import Conflict

V = TypeVar("V", Dataset, Code)
FOLDERS: Final[Mapping[type[Dataset | Code], str]] = {Dataset: "datasets", Code: "code"}
"""Of each tenant. What is stored lies there, whatever becomes of the names of tables and classes."""


def store(parts: Parts, row: V, content: Callable[[V], Any], put: Callable[[str], None]) -> tuple[V, bool]:
    """(the version, whether it is new); the newest one of the name is the answer where it has the same content. Objects first (`put`
    is told below which prefix), then the row that names them: a row never points at nothing."""
    prefix = prefix_of(row)  # now: of a row under which the connection died nothing can be read
    needless = True
    try:
        with parts.database.tenant(row.tenant_id) as session:
            there = Repository(session, row.tenant_id).same_version(row, content)
        if there is None:
            put(prefix)
            with parts.database.tenant(row.tenant_id) as session:
                there = Repository(session, row.tenant_id).add_version(row, content)
                needless = there is not row  # a connection that dies from here on may have brought the row in
        return there, there is row
    finally:
        if needless:
            parts.storage.delete_prefix(prefix)


def prefix_of(row: Dataset | Code) -> str:
    """Where the files of a new one are put; of one that is there, the row says."""
    return f"tenants/{row.tenant_id}/{FOLDERS[type(row)]}/{row.id}"


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
