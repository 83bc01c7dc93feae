"""What a tenant may look up: by id, name, `name@version` or `name@alias`, and in pages. Another tenant's object is as
missing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Never, TypeVar

from sqlalchemy import ColumnElement, Select, func, select, text, tuple_
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Checkpoint, Code, Dataset, Environment, Job, Model, ModelAlias, ModelVersion, Table
from cluster.errors import InvalidRequest, NotFound

V = TypeVar("V", Dataset, Environment, Code)
Named = Dataset | Environment | Code | Model | BaseModel
P = TypeVar("P", Dataset, Environment, Code, Job, Model, ModelVersion, Checkpoint)
LABELS = {
    Dataset: "dataset",
    Environment: "environment",
    Code: "code",
    Job: "job",
    Model: "model",
    ModelVersion: "model_version",
    Checkpoint: "checkpoint",
    BaseModel: "base_model",
}


NEAR_NAMES = 500
"""Among so many is looked for what may have been meant."""


@dataclass(frozen=True)
class Page(Generic[P]):
    data: Sequence[P]
    has_more: bool


@dataclass(frozen=True)
class PageRequest:
    """`after`: the id of the last row that was seen."""

    after: str | None = None
    limit: int = 20
    newest_first: bool = True


class Repository:
    """Over one transaction (`Database.tenant`), for one tenant. The filter here and row-level security say the same,
    twice."""

    def __init__(self, session: Session, tenant: str) -> None:
        self.session = session
        self.tenant = tenant

    def job(self, job_id: str, *, lock: bool = False) -> Job:
        """`lock`: hold the row until the transaction ends. Raises `NotFound`."""
        statement = select(Job).where(Job.id == job_id, Job.tenant_id == self.tenant)
        job = self.session.scalar(statement.with_for_update() if lock else statement)
        return job if job is not None else self._missing(Job, job_id)

    def dataset(self, ref: str) -> Dataset:
        return self._versioned(Dataset, ref)

    def environment(self, ref: str) -> Environment:
        return self._versioned(Environment, ref)

    def code(self, ref: str) -> Code:
        return self._versioned(Code, ref)

    def base_model(self, ref: str) -> BaseModel:
        """By id or name; base models belong to all tenants. Raises `NotFound`."""
        found = self.session.scalar(select(BaseModel).where((BaseModel.id == ref) | (BaseModel.name == ref)))
        return found if found is not None else self._missing(BaseModel, ref)

    def near(self, ref: str, *tables: type[Named]) -> str | None:
        """A name that may have been meant: the tenant's own, or a base model's."""
        names: set[str] = set()
        for table in tables:
            own = select(table.name)
            if not issubclass(table, BaseModel):
                own = own.where(table.tenant_id == self.tenant, table.deleted_at.is_(None))
            names.update(self.session.scalars(own.distinct().limit(NEAR_NAMES)))
        found = difflib.get_close_matches(ref.partition("@")[0], names, n=1, cutoff=0.6)
        return found[0] if found else None

    def model(self, ref: str) -> Model:
        """By id or name. Raises `NotFound`."""
        own = self._own(Model).where((Model.id == ref) | (Model.name == ref))
        found = self.session.scalar(own)
        return found if found is not None else self._missing(Model, ref)

    def model_version(self, ref: str) -> ModelVersion:
        """By its id, `model` (the newest), `model@3` or `model@alias`, where `model` is a name or id. Raises
        `NotFound`."""
        found = self.session.scalar(self._own(ModelVersion).where(ModelVersion.id == ref))
        if found is not None:
            return found
        name, _, which = ref.partition("@")
        model = self.model(name)
        versions = self._own(ModelVersion).where(ModelVersion.model_id == model.id)
        if not which:
            versions = versions.order_by(ModelVersion.version.desc()).limit(1)
        elif (number := _number(which)) is not None:
            versions = versions.where(ModelVersion.version == number)
        else:
            versions = versions.where(ModelVersion.id == self._aliased(model.id, which))
        found = self.session.scalar(versions)
        return found if found is not None else self._missing(ModelVersion, ref)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        """Locked, so that it is not let go of before the transaction ends. Raises `NotFound`."""
        own = self._own(Checkpoint).where(Checkpoint.id == checkpoint_id)
        found = self.session.scalar(own.with_for_update(read=True))
        return found if found is not None else self._missing(Checkpoint, checkpoint_id)

    def set_alias(self, version: ModelVersion, alias: str) -> ModelAlias:
        """Promotes: the alias means this version from now on; what it meant before stays as history."""
        self._lock(f"alias {version.model_id} {alias}")
        row = ModelAlias(
            model_id=version.model_id,
            alias=alias,
            number=self._last_alias(version.model_id, alias) + 1,
            tenant_id=self.tenant,
            version_id=version.id,
        )
        self.session.add(row)
        self.session.flush()
        return row

    def next_version(self, table: type[Dataset] | type[Environment] | type[Code], name: str) -> int:
        """The number for a new version of a name (deleted ones count: a number is never used twice). Others who ask
        for the same name wait until this transaction ends."""
        self._lock(f"{table.__tablename__} {self.tenant} {name}")
        last = select(func.max(table.version)).where(table.tenant_id == self.tenant, table.name == name)
        return (self.session.scalar(last) or 0) + 1

    def same_version(self, row: V, content: Callable[[V], Any]) -> V | None:
        """The newest version of the row's name, if it has the row's content."""
        there = self._newest(type(row), row.name)
        return there if there is not None and content(there) == content(row) else None

    def add_version(self, row: V, content: Callable[[V], Any]) -> V:
        """The row as the next version of its name; or the newest one, if that has the same content."""
        row.version = self.next_version(
            type(row), row.name
        )  # under a lock: of two equal ones the second finds the first
        there = self.same_version(row, content)
        if there is not None:
            return there
        self.session.add(row)
        self.session.flush()
        self.session.refresh(row)
        return row

    def _newest(self, table: type[V], name: str, *conditions: ColumnElement[bool]) -> V | None:
        """By number: one that waited for another's lock began before it."""
        own = self._own(table).where(table.name == name, *conditions)
        return self.session.scalar(own.order_by(table.version.desc()).limit(1))

    def page(self, table: type[P], request: PageRequest, *conditions: ColumnElement[bool]) -> Page[P]:
        """Rows of the tenant in order of creation. Raises `InvalidRequest` for a cursor that names nothing."""
        statement = self._own(table).where(*conditions)
        place = tuple_(table.created_at, table.id)
        if request.after is not None:
            here = self.session.execute(
                select(table.created_at, table.id).where(table.id == request.after, table.tenant_id == self.tenant)
            ).one_or_none()
            if here is None:
                raise InvalidRequest(
                    f"after={request.after[:80]!r} is not the id of a {LABELS[table]}",
                    code="invalid_cursor",
                    param="after",
                    hint="Send the id of the last object of the page before.",
                )
            there = tuple_(here[0], here[1])
            statement = statement.where(place < there if request.newest_first else place > there)
        columns = (table.created_at, table.id)
        order = [column.desc() if request.newest_first else column.asc() for column in columns]
        rows = self.session.scalars(statement.order_by(*order).limit(request.limit + 1)).all()
        return Page(rows[: request.limit], len(rows) > request.limit)

    def _own(self, table: type[P]) -> Select[P]:
        """The tenant's rows that are not deleted."""
        statement = select(table).where(table.tenant_id == self.tenant)
        deleted_at = getattr(table, "deleted_at", None)
        return statement if deleted_at is None else statement.where(deleted_at.is_(None))

    def _versioned(self, table: type[V], ref: str) -> V:
        found = self.session.scalar(self._own(table).where(table.id == ref))
        if found is not None:
            return found
        name, _, which = ref.partition("@")
        found = self._newest(table, name, *((table.version == _number(which),) if which else ()))
        return found if found is not None else self._missing(table, ref)

    def _aliased(self, model_id: str, alias: str) -> str | None:
        newest = select(ModelAlias.version_id).where(ModelAlias.model_id == model_id, ModelAlias.alias == alias)
        return self.session.scalar(newest.order_by(ModelAlias.number.desc()).limit(1))

    def _last_alias(self, model_id: str, alias: str) -> int:
        last = select(func.max(ModelAlias.number)).where(ModelAlias.model_id == model_id, ModelAlias.alias == alias)
        return self.session.scalar(last) or 0

    def _missing(self, table: type[Table], ref: str) -> Never:
        label = LABELS[table]
        near = self.near(ref, table) if table in (Dataset, Environment, Code, Model, BaseModel) else None
        raise NotFound(
            f"{label.replace('_', ' ')} {ref[:120]!r} does not exist",
            code=f"{label}_not_found",
            hint=f"Did you mean `{near}`?"
            if near and near != ref.partition("@")[0]
            else "Look at the list of what there is; names and ids of other tenants are not found either.",
        )

    def _lock(self, what: str) -> None:
        self.session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:what, 0))"), {"what": what})


def _number(text: str) -> int | None:
    """A version number that a column can hold."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
