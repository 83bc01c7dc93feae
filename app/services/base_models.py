"""Base models: what all tenants may name; operators add them. The importer, elsewhere, does the work."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from app.auth.permissions import require
from app.db import ids
from app.db.models import BaseModel
from app.db.models import Job as JobRow
from app.schemas.operators import NewBaseModel
from app.services.access import Caller
from app.services.job_view import unix
from app.services.parts import Parts
from cluster.errors import Conflict, NotFound


class BaseModelService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def add(self, caller: Caller, new: NewBaseModel) -> dict[str, Any]:
        """The same again, while it is not failed, is the row that is there. Raises `Conflict` for a name that is taken."""
        caller.must_be("operator")
        require(caller.identity, "model:deploy", new.name)
        with self._parts.database.platform() as session:
            there = session.scalar(select(BaseModel).where(BaseModel.name == new.name).with_for_update())
            if there is not None and there.status != "failed":
                if (there.source, there.chat_template) == (new.source, new.chat_template):
                    return base_model_view(there)
                raise Conflict(
                    f"base model {new.name} exists already, from {there.source}",
                    code="base_model_exists",
                    param="name",
                    hint="Choose another name, or remove that one first.",
                )
            row = there or BaseModel(id=ids.new_id(ids.BASE_MODEL), name=new.name)
            row.status, row.source, row.chat_template = "preparing", new.source, new.chat_template
            row.error = row.claimed_at = None
            session.add(row)
            session.flush()
            session.refresh(row)
            return base_model_view(row)

    def list(self, caller: Caller) -> list[dict[str, Any]]:
        require(caller.identity, "model:read")
        with self._parts.database.platform() as session:
            return [base_model_view(row) for row in session.scalars(select(BaseModel).order_by(BaseModel.name))]

    def get(self, caller: Caller, ref: str) -> dict[str, Any]:
        require(caller.identity, "model:read", ref)
        with self._parts.database.platform() as session:
            found = session.scalar(select(BaseModel).where((BaseModel.id == ref) | (BaseModel.name == ref)))
            if found is None:
                raise _missing(ref)
            return base_model_view(found)

    def remove(self, caller: Caller, ref: str) -> str:
        """Raises `Conflict` when a job refers to it: its artifacts stand on it."""
        caller.must_be("operator")
        require(caller.identity, "model:delete", ref)
        with self._parts.database.platform() as session:
            row = session.scalar(
                select(BaseModel).where((BaseModel.id == ref) | (BaseModel.name == ref)).with_for_update()
            )
            if row is None:
                raise _missing(ref)
            if session.scalar(select(JobRow.id).where(JobRow.base_model_id == row.id).limit(1)) is not None:
                raise Conflict(
                    f"jobs were trained from {row.name}, and their models need it",
                    code="base_model_in_use",
                    hint="Keep it; a newer one can have another name.",
                )
            removed, prefix = row.id, row.prefix
            session.delete(row)
        if prefix is not None:
            self._parts.storage.delete_prefix(prefix)
        return removed


def _missing(ref: str) -> NotFound:
    return NotFound(
        f"base model {ref[:120]!r} does not exist", code="base_model_not_found", hint="See `heliostat base-model ls`."
    )


def base_model_view(row: BaseModel) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "base_model",
        "name": row.name,
        "status": row.status,
        "source": row.source,
        "sha256": row.sha256,
        "parameters": row.parameters,
        "bytes": row.bytes,
        "architecture": (row.config or {}).get("model_type"),
        "chat_template": row.chat_template,
        "error": row.error,
        "created_at": unix(row.created_at),
    }
