"""Code that tenants bring for jobs of method `custom`: an archive becomes a version of a name, or nothing at all. Kept as files,
not as the archive: nodes check each by its hash, and nothing hostile is unpacked there."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.code.archive import Unpacked, unpack
from app.db import ids
from app.db.models import Code as CodeRow
from app.db.models import Job as JobRow
from app.db.repository import Page, PageRequest, Repository
from app.schemas.code import Code
from app.services.access import Caller
from app.services.datasets import Upload, dataset_name, sha256_of
from app.services.parts import Parts
from cluster.core.job import TERMINAL
from cluster.errors import Conflict
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
            return self._store(row, unpacked)

    def _store(self, row: CodeRow, unpacked: Unpacked) -> tuple[Code, bool]:
        """Objects first, then the row that names them: a row never points at nothing."""
        stored = False
        try:
            with self._parts.database.tenant(row.tenant_id) as session:
                there = _same(session, row)
            if there is not None:
                return view(there), False
            for name, (path, _, _) in unpacked.files.items():
                self._parts.storage.put_file(f"{row.prefix}/{name}", path)
            with self._parts.database.tenant(row.tenant_id) as session:
                there = _insert(session, row)
            stored = there is row
            return view(there), stored
        finally:
            if not stored:
                self._parts.storage.delete_prefix(row.prefix)

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
            using = JobRow.code_id == row.id, JobRow.state.not_in([str(state) for state in TERMINAL])
            user = session.scalar(select(JobRow.id).where(*using).limit(1))
            if user is not None:
                raise Conflict(
                    f"job {user} still needs this code",
                    code="code_in_use",
                    hint="Cancel the job, or wait for its end.",
                )
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
    code_id = ids.new_id(ids.CODE)
    return CodeRow(
        id=code_id,
        tenant_id=tenant,
        name=name,
        files=unpacked.sha256,
        bytes=unpacked.bytes,
        sha256=folder_sha256(unpacked.sha256),
        source_sha256=sha256_of(archive),
        prefix=f"tenants/{tenant}/code/{code_id}",
    )


def _insert(session: Session, row: CodeRow) -> CodeRow:
    # The number is taken under a lock, so of two equal uploads the second finds the first.
    row.version = Repository(session, row.tenant_id).next_version(CodeRow, row.name)
    there = _same(session, row)
    if there is not None:
        return there
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _same(session: Session, row: CodeRow) -> CodeRow | None:
    """The newest version of the name, if it has the same files."""
    newest = Repository(session, row.tenant_id).page(CodeRow, PageRequest(limit=1), CodeRow.name == row.name).data
    return newest[0] if newest and newest[0].sha256 == row.sha256 else None
