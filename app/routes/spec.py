"""Reads an environment.yml from a body: JSON {"spec"}, the YAML itself, or a multipart `file`."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from app.schemas.operators import NewEnvironment
from cluster.errors import HeliostatError, InvalidRequest

YAML = ("application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml", "text/plain")
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": NewEnvironment.model_json_schema()},
            "application/yaml": {"schema": {"type": "string", "description": "environment.yml"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


async def spec_text(request: Request) -> str:
    """Raises `InvalidRequest`; 415 for another type of body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _from_json(await request.body())
    if kind in YAML:
        return _decoded(await request.body())
    if kind == "multipart/form-data":
        return await _from_form(request)
    cause = HeliostatError(
        "an environment is sent as JSON, YAML or a form",
        code="unsupported_media_type",
        hint="For instance `curl --data-binary @environment.yml -H 'content-type: application/yaml' …`.",
    )
    raise HTTPException(415) from cause


def _from_json(body: bytes) -> str:
    try:
        return NewEnvironment.model_validate_json(body).spec
    except ValidationError as error:
        problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(problems) from None


async def _from_form(request: Request) -> str:
    async with request.form(max_files=1, max_fields=1) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise InvalidRequest(
                "the form has no file", code="missing_field", param="file", hint="Send environment.yml as `file`."
            )
        return _decoded(await file.read())


def _decoded(body: bytes) -> str:
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"environment.yml is not UTF-8 (byte {error.start})",
            code="not_utf8",
            param="spec",
            hint="Save it as UTF-8.",
        ) from None
    if "\0" in text:
        raise InvalidRequest("environment.yml holds a NUL character", param="spec", hint="Send a text file.")
    return text
