"""Code that tenants bring for jobs of method `custom`: an archive becomes a version of a name, or nothing at all. Kept as files,
not as the archive: nodes check each by its hash, and nothing hostile is unpacked there."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import IO, Any

from sqlalchemy import func

from app.code.archive import Unpacked, unpack
from app.db import ids
from app.db.models import Code as CodeRow
from app.db.models import Job as JobRow
from app.db.repository import Page, PageRequest, Repository
from app.schemas.code import Code
from app.services.access import Caller
from app.services.datasets import Upload, dataset_name, sha256_of
from app.services.parts import Parts
from app.services.versions import prefix_of, refuse_used, store
from cluster.storage.objects import folder_sha256


class CodeService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def may_create(self, caller: Caller) -> str:
        """The tenant. Raises `Forbidden`."""
        return caller.may("model:train")

    def create(self, caller: Caller, upload: Upload) -> tuple[Code, bool]:
        """(code, whether it is new). The same files again under the same name are the version that is there."""
        tenant = self.may_create(caller)
        name = dataset_name(upload, "code")
        with tempfile.TemporaryDirectory(prefix="heliostat-code-") as folder:
            unpacked = unpack(upload.file, Path(folder))
            row = _row(tenant, name, unpacked, upload.file)
            row, new = store(self._parts, row, lambda row: row.sha256, partial(self._put, unpacked))
            return view(row), new

    def _put(self, unpacked: Unpacked, prefix: str) -> None:
        for name, (path, _, _) in unpacked.files.items():
            self._parts.storage.put_file(f"{prefix}/{name}", path)

    def page(self, caller: Caller, request: PageRequest, name: str | None) -> Page[CodeRow]:
        tenant = caller.may("model:read")
        conditions = () if name is None else (CodeRow.name == name,)
        with self._parts.database.tenant(tenant) as session:
            return Repository(session, tenant).page(CodeRow, request, *conditions)

    def get(self, caller: Caller, ref: str) -> Code:
        tenant = caller.may("model:read", ref)
        with self._parts.database.tenant(tenant) as session:
            return view(Repository(session, tenant).code(ref), whole=True)

    def delete(self, caller: Caller, ref: str) -> str:
        """The files go at once; the number of the version is not used again. Raises `Conflict` while a job needs it."""
        tenant = caller.may("model:delete", ref)
        with self._parts.database.tenant(tenant) as session:
            row = Repository(session, tenant).code(ref)
            session.refresh(row, with_for_update=True)  # a job that is being created holds it: wait and see that job
            refuse_used(session, "code", JobRow.code_id == row.id)
            row.deleted_at = func.now()
            code_id, prefix = row.id, row.prefix
        self._parts.storage.delete_prefix(prefix)
        return code_id


def view(row: CodeRow, *, whole: bool = False) -> Code:
    return Code(
        id=row.id,
        name=row.name,
        version=row.version,
        ref=f"{row.name}@{row.version}",
        bytes=row.bytes,
        file_count=len(row.files),
        sha256=row.sha256,
        source_sha256=row.source_sha256,
        files=row.files if whole else None,
        created_at=int(row.created_at.timestamp()),
    )


def _row(tenant: str, name: str, unpacked: Unpacked, archive: IO[Any]) -> CodeRow:
    row = CodeRow(
        id=ids.new_id(ids.CODE),
        tenant_id=tenant,
        name=name,
        files=unpacked.sha256,
        bytes=unpacked.bytes,
        sha256=folder_sha256(unpacked.sha256),
        source_sha256=sha256_of(archive),
    )
    row.prefix = prefix_of(row)
    return row
