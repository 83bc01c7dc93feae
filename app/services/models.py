"""Tuned models: names, versions, aliases, and their files as a download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app.db.models import Job as JobRow
from app.db.models import Model, ModelAlias, ModelVersion
from app.db.repository import PageRequest, Repository
from app.services.access import Caller
from app.services.archive import Archive
from app.services.job_view import unix
from app.services.parts import Parts
from app.services.versions import refuse_used
from cluster.errors import Conflict, InvalidRequest, NotFound

OTHER_FORMS = ("merged", "gguf")
"""Folders of a version that hold the model once more."""


@dataclass(frozen=True)
class Download:
    archive: Archive
    filename: str
    sha256: str
    bytes: int


class ModelService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._measured = lru_cache(maxsize=1024)(self._measure)

    def page(self, caller: Caller, request: PageRequest) -> tuple[list[dict[str, Any]], bool]:
        tenant = caller.may("model:read")
        with self._parts.database.tenant(tenant) as session:
            found = Repository(session, tenant).page(Model, request)
            return [model_view(session, row) for row in found.data], found.has_more

    def get(self, caller: Caller, ref: str) -> dict[str, Any]:
        """A name or id: the model; `name@version`, `name@alias` or a version's id: that version."""
        tenant = caller.may("model:read", ref)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            if "@" in ref or ref.startswith("mv-"):
                return version_view(session, repository.model_version(ref))
            return model_view(session, repository.model(ref))

    def versions(self, caller: Caller, ref: str, request: PageRequest) -> tuple[list[dict[str, Any]], bool]:
        tenant = caller.may("model:read", ref)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            model = repository.model(ref)
            found = repository.page(ModelVersion, request, ModelVersion.model_id == model.id)
            return [version_view(session, row) for row in found.data], found.has_more

    def promote(self, caller: Caller, ref: str, alias: str, version: int | str) -> dict[str, Any]:
        """The alias means this version from now on. Raises `NotFound`."""
        tenant = caller.may("model:deploy", ref)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            row = _version_of(repository, repository.model(ref), version)
            repository.set_alias(row, alias)
            return version_view(session, row)

    def rollback(self, caller: Caller, ref: str, alias: str) -> dict[str, Any]:
        """The alias means again what it meant before its newest promotion to another version. Raises `Conflict`."""
        tenant = caller.may("model:deploy", ref)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            model = repository.model(ref)
            row = _before(session, model, alias)
            repository.set_alias(row, alias)
            return version_view(session, row)

    def download(self, caller: Caller, ref: str, output: str | None = None) -> Download:
        """A version as a tar, without its other forms, or one of them; its hash is known before the first byte goes out. Raises
        `NotFound` for a form that the version does not have."""
        tenant = caller.may("model:read", ref)
        with self._parts.database.tenant(tenant) as session:
            version = Repository(session, tenant).model_version(ref)
            model = session.get_one(Model, version.model_id)
        other = output if output in OTHER_FORMS else None
        files = form_of(version.files, other)
        if not files or (output == "adapter" and version.kind != "adapter"):
            raise _no_such_form(ref, output or "model", version)
        folder = "-".join([model.name, str(version.version), *([other] if other else [])])
        prefix = f"{version.prefix}/{other}" if other else version.prefix
        sha256, size = self._measured(version.id, prefix, folder, tuple(sorted(files.items())))
        return Download(Archive(self._parts.storage, prefix, folder, files), f"{folder}.tar", sha256, size)

    def _measure(self, _id: str, prefix: str, folder: str, files: tuple[tuple[str, str], ...]) -> tuple[str, int]:
        return Archive(self._parts.storage, prefix, folder, dict(files)).measure()

    def delete(self, caller: Caller, ref: str) -> str:
        """A model with all versions, or one version of it. Raises `Conflict` while a job continues from it."""
        tenant = caller.may("model:delete", ref)
        with self._parts.database.tenant(tenant) as session:
            repository = Repository(session, tenant)
            if "@" in ref or ref.startswith("mv-"):
                gone, deleted = [repository.model_version(ref)], None
            else:
                deleted = repository.model(ref)
                gone = list(session.scalars(_living(deleted.id)))
            for row in gone:  # a job that is being created from it holds it: wait and see that job
                session.refresh(row, with_for_update=True)
            refuse_used(session, "model", JobRow.parent_version_id.in_([row.id for row in gone]))
            for row in gone:
                row.deleted_at = func.now()
            if deleted is not None:
                deleted.deleted_at = func.now()
            prefixes = [row.prefix for row in gone]
            deleted_id = deleted.id if deleted else gone[0].id
        for prefix in prefixes:
            self._parts.storage.delete_prefix(prefix)
        return deleted_id


def form_of(files: dict[str, Any], other: str | None) -> dict[str, str]:
    """name → sha256 of what lies in the folder of that form, or of what lies in none."""
    if other is None:
        return {name: sha256 for name, sha256 in files.items() if name.partition("/")[0] not in OTHER_FORMS}
    inside = f"{other}/"
    return {name.removeprefix(inside): sha256 for name, sha256 in files.items() if name.startswith(inside)}


def _no_such_form(ref: str, output: str, version: ModelVersion) -> NotFound:
    there = [version.kind, *(form for form in OTHER_FORMS if form_of(version.files, form))]
    return NotFound(
        f"model {ref[:120]} has no output {output}",
        code="output_not_found",
        param="output",
        hint=f"It has: {', '.join(there)}. Others are made when the job asks for them in `outputs`.",
    )


def _living(model_id: str) -> Select[ModelVersion]:
    return select(ModelVersion).where(ModelVersion.model_id == model_id, ModelVersion.deleted_at.is_(None))


def _version_of(repository: Repository, model: Model, version: int | str) -> ModelVersion:
    row = repository.model_version(str(version) if str(version).startswith("mv-") else f"{model.id}@{version}")
    if row.model_id != model.id:
        raise NotFound(
            f"model {model.name} has no version {str(version)[:80]!r}", code="model_version_not_found", param="version"
        )
    return row


def _before(session: Session, model: Model, alias: str) -> ModelVersion:
    rows = session.execute(
        select(ModelAlias, ModelVersion)
        .join(ModelVersion, ModelAlias.version_id == ModelVersion.id)
        .where(ModelAlias.model_id == model.id, ModelAlias.alias == alias)
        .order_by(ModelAlias.number.desc())
    ).all()
    if not rows:
        raise NotFound(f"model {model.name} has no alias {alias!r}", code="alias_not_found", param="alias")
    now = rows[0][0].version_id
    earlier = (version for _, version in rows if version.id != now and version.deleted_at is None)
    found = next(earlier, None)
    if found is None:
        raise Conflict(
            f"{model.name}@{alias} has meant no other version that is still there",
            code="nothing_to_roll_back",
            hint="Promote the version that it should mean.",
        )
    return found


def model_view(session: Session, row: Model) -> dict[str, Any]:
    newest = select(func.max(ModelVersion.version)).where(
        ModelVersion.model_id == row.id, ModelVersion.deleted_at.is_(None)
    )
    return {
        "id": row.id,
        "object": "model",
        "name": row.name,
        "latest_version": session.scalar(newest),
        "aliases": _aliases(session, row.id),
        "created_at": unix(row.created_at),
    }


def _aliases(session: Session, model_id: str) -> dict[str, int]:
    """Alias → the number of the version that it means now."""
    rows = session.execute(
        select(ModelAlias.alias, ModelVersion.version)
        .join(ModelVersion, ModelAlias.version_id == ModelVersion.id)
        .where(ModelAlias.model_id == model_id, ModelVersion.deleted_at.is_(None))
        .order_by(ModelAlias.alias, ModelAlias.number)
    )
    return dict(rows.all())


def version_view(session: Session, row: ModelVersion) -> dict[str, Any]:
    model = session.get_one(Model, row.model_id)
    aliases = [alias for alias, version in _aliases(session, model.id).items() if version == row.version]
    return {
        "id": row.id,
        "object": "model.version",
        "model_id": model.id,
        "name": model.name,
        "version": row.version,
        "ref": f"{model.name}@{row.version}",
        "aliases": aliases,
        "kind": row.kind,
        "job_id": row.job_id,
        "files": row.files,
        "metrics": row.metrics,
        "lineage": row.lineage,
        "created_at": unix(row.created_at),
    }


def check_alias(alias: str) -> str:
    """A number would be taken for a version."""
    if alias.isdecimal():
        raise InvalidRequest(
            f"{alias[:80]!r} cannot be an alias: it reads as a version's number",
            code="invalid_alias",
            param="alias",
            hint="For instance prod.",
        )
    return alias
