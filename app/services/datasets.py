"""Datasets: an upload becomes a version of a name, or nothing at all."""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import orjson
from sqlalchemy import func

from app.datasets.ingest import Ingested, Source, check_type, ingest, parse_columns
from app.datasets.preview import render
from app.db import ids
from app.db.models import Dataset as DatasetRow
from app.db.models import Job as JobRow
from app.db.repository import Page, PageRequest, Repository
from app.schemas.common import NAME_PATTERN, NAME_RULE
from app.schemas.datasets import Dataset, DatasetPreview, DatasetReport, PreviewRow, Span
from app.services.access import Caller
from app.services.parts import Parts
from app.services.versions import prefix_of, refuse_used, store
from cluster.errors import InvalidRequest
from cluster.storage.objects import CHUNK_BYTES

ROWS = "rows.jsonl"
PREVIEW_ROWS = 3
PREVIEW_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Upload:
    """`columns`: `field=column` pairs."""

    file: IO[bytes]
    filename: str
    name: str | None = None
    type: str = "auto"
    columns: list[str] = field(default_factory=list)


class DatasetService:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def create(self, caller: Caller, upload: Upload) -> tuple[Dataset, bool]:
        """(dataset, whether it is new). The same content again under the same name is the version that is there."""
        tenant = self.may_create(caller)
        name = dataset_name(upload)
        source = Source(upload.file, upload.filename, check_type(upload.type), parse_columns(upload.columns))
        with tempfile.TemporaryFile() as canonical:
            made = ingest(source, canonical, self._parts.settings.http.max_upload_bytes)
            row = _row(tenant, name, made, sha256_of(upload.file))
            row, new = store(self._parts, row, _content, partial(self._put, (upload.file, canonical)))
            return view(row), new

    def may_create(self, caller: Caller) -> str:
        """The tenant. Raises `Forbidden`."""
        return caller.may("dataset:write")

    def _put(self, files: tuple[IO[bytes], IO[bytes]], prefix: str) -> None:
        for name, file in zip(("source", ROWS), files, strict=True):
            file.seek(0)
            self._parts.storage.put_stream(f"{prefix}/{name}", file)

    def page(self, caller: Caller, request: PageRequest, name: str | None = None) -> Page[DatasetRow]:
        tenant = caller.may("dataset:read")
        conditions = () if name is None else (DatasetRow.name == name,)
        with self._parts.database.tenant(tenant) as session:
            return Repository(session, tenant).page(DatasetRow, request, *conditions)

    def get(self, caller: Caller, ref: str) -> Dataset:
        return view(self._row(caller, ref))

    def report(self, caller: Caller, ref: str) -> DatasetReport:
        row = self._row(caller, ref)
        return DatasetReport(dataset_id=row.id, **row.report)

    def preview(self, caller: Caller, ref: str) -> DatasetPreview:
        """The first rows as they will be learned."""
        row = self._row(caller, ref)
        shown = []
        with self._parts.storage.reader(row.object_key) as source:
            for number, line in enumerate(_first_lines(source, PREVIEW_ROWS), start=1):
                spans = [Span(**span) for span in render(orjson.loads(line))]
                shown.append(PreviewRow(row=number, spans=spans))
        return DatasetPreview(dataset_id=row.id, rows=shown)

    def delete(self, caller: Caller, ref: str) -> str:
        """The rows go at once; the number of the version is not used again. Raises `Conflict` while a job needs it."""
        tenant = caller.may("dataset:delete", ref)
        with self._parts.database.tenant(tenant) as session:
            row = Repository(session, tenant).dataset(ref)
            session.refresh(row, with_for_update=True)  # a job that is being created holds it: wait and see that job
            refuse_used(session, "dataset", (JobRow.dataset_id == row.id) | (JobRow.validation_dataset_id == row.id))
            row.deleted_at = func.now()
            dataset_id, prefix = row.id, row.object_key.removesuffix(f"/{ROWS}")
        self._parts.storage.delete_prefix(prefix)
        return dataset_id

    def _row(self, caller: Caller, ref: str) -> DatasetRow:
        tenant = caller.may("dataset:read", ref)
        with self._parts.database.tenant(tenant) as session:
            return Repository(session, tenant).dataset(ref)


def view(row: DatasetRow) -> Dataset:
    return Dataset(
        id=row.id,
        name=row.name,
        version=row.version,
        ref=f"{row.name}@{row.version}",
        format=row.format,
        task=row.task,
        rows=row.rows,
        bytes=row.bytes,
        max_chars=row.max_chars,
        sha256=row.sha256,
        source_sha256=row.source_sha256,
        warnings=row.report.get("warnings", []),
        created_at=int(row.created_at.timestamp()),
    )


def dataset_name(upload: Upload, default: str = "dataset") -> str:
    """As asked for, else made from the file's name. Raises `InvalidRequest`."""
    if upload.name is None:
        stem = upload.filename.rsplit("/", 1)[-1].rsplit("\\", 1)[-1].split(".", 1)[0].lower()
        return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:64] or default
    if not re.fullmatch(NAME_PATTERN, upload.name):
        raise InvalidRequest(
            f"a name has {NAME_RULE}",
            code="invalid_name",
            param="name",
            hint="For instance legal_docs_2024.",
        )
    return upload.name


def _row(tenant: str, name: str, made: Ingested, source_sha256: str) -> DatasetRow:
    row = DatasetRow(
        id=ids.new_id(ids.DATASET),
        tenant_id=tenant,
        name=name,
        format=str(made.format),
        task=made.task,
        rows=made.rows,
        bytes=made.bytes,
        sha256=made.sha256,
        source_sha256=source_sha256,
        report=made.report,
        max_chars=made.max_chars,
    )
    row.object_key = f"{prefix_of(row)}/{ROWS}"
    return row


def _content(row: DatasetRow) -> tuple[str, str]:
    return row.sha256, row.source_sha256


def sha256_of(file: IO[bytes]) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _first_lines(source: Any, count: int) -> list[bytes]:
    held = b""
    while held.count(b"\n") < count and len(held) < PREVIEW_LINE_BYTES * count:
        chunk = source.read(65536)
        if not chunk:
            break
        held += chunk
    return held.splitlines()[:count]
