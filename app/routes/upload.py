"""Reads a multipart upload as a stream: the file goes to an unlinked temporary file, never whole into memory."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from app.schemas.common import did_you_mean
from app.services.datasets import Upload
from cluster.errors import HeliostatError, InvalidRequest, TooLarge

FIELDS = ("file", "name", "format", "map")
CODE_FIELDS = ("file", "name")
MAX_CODE_BYTES = 256 * 1024 * 1024
"""Of an archive of code; its contents have limits of their own."""
ENVELOPE_BYTES = 64 * 1024
"""What boundaries and the other fields may take."""

NAME = {"name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"}}


def multipart(file: str, fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI's words for a form with a `file`, described so, and these fields."""
    properties = {"file": {"type": "string", "format": "binary", "description": file}, **fields}
    schema = {"type": "object", "required": ["file"], "additionalProperties": False, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


MULTIPART = multipart(
    "Rows.",
    {
        **NAME,
        "format": {"type": "string", "enum": ["auto", "jsonl", "json", "csv", "parquet"]},
        "map": {"type": "array", "items": {"type": "string"}, "description": "field=column"},
    },
)
CODE_MULTIPART = multipart(".tar.gz or .zip", NAME)
BUNDLE_MULTIPART = multipart("A bundle of `env export`.", {})


@asynccontextmanager
async def read_upload(request: Request, max_bytes: int, fields: tuple[str, ...] = FIELDS) -> AsyncIterator[Upload]:
    """Raises `TooLarge`, `InvalidRequest`. Whatever happens, the temporary file is gone afterwards."""
    form = await _parsed(request, max_bytes)
    try:
        yield _upload(form, fields)
    finally:
        await form.close()


read_code = partial(read_upload, fields=CODE_FIELDS)
read_bundle = partial(read_upload, fields=("file",))


async def _parsed(request: Request, max_bytes: int) -> FormData:
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        cause = HeliostatError(
            "a file is uploaded as multipart/form-data",
            code="unsupported_media_type",
            hint="For instance `curl -F file=@rows.jsonl -F name=my-data …`.",
        )
        raise HTTPException(415) from cause
    parser = MultiPartParser(request.headers, _limited(request, max_bytes), max_files=1, max_fields=100)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise InvalidRequest(
            f"the multipart body cannot be read: {error}", code="invalid_multipart", hint="Send one `file` part."
        ) from None


async def _limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > max_bytes + ENVELOPE_BYTES:
        raise _too_large(max_bytes)
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > max_bytes + ENVELOPE_BYTES:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"an upload may have {max_bytes} bytes at most",
        param="file",
        hint="Upload the data in parts as several datasets, or ask an operator to raise http.max_upload_bytes.",
    )


def _upload(form: FormData, fields: tuple[str, ...]) -> Upload:
    unknown = sorted(set(form) - set(fields))
    if unknown:
        raise InvalidRequest(
            f"unknown form field {unknown[0][:80]!r}",
            code="unknown_field",
            param=unknown[0][:80],
            hint=did_you_mean(unknown[0], fields) or f"Known: {', '.join(fields)}.",
        )
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise InvalidRequest(
            "the form has no file", code="missing_field", param="file", hint="Send a part named `file`."
        )
    return Upload(
        file.file, file.filename or "", _text(form, "name"), _text(form, "format") or "auto", _texts(form, "map")
    )


def _text(form: FormData, field: str) -> str | None:
    values = _texts(form, field)
    if len(values) > 1:
        raise InvalidRequest(f"`{field}` is given twice", param=field, hint="Give it once.")
    return values[0] if values else None


def _texts(form: FormData, field: str) -> list[str]:
    values = form.getlist(field)
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != len(values):
        raise InvalidRequest(f"`{field}` is a file where text is meant", param=field, hint="Send it as a form field.")
    return texts
