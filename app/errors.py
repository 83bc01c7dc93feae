"""The one place where an error becomes an HTTP answer: error class → status, and the body that every error has."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.datasets.problems import DatasetRefused
from app.invalid import told_of
from cluster.errors import (
    Conflict,
    Fenced,
    Forbidden,
    HeliostatError,
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from runtime_envs.errors import EnvironmentProblem

log = logging.getLogger("heliostat.http")

STATUS: dict[type[HeliostatError], int] = {
    InvalidRequest: 422,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Unauthorized: 401,
    Forbidden: 403,
    QuotaExceeded: 429,
    Unavailable: 503,
    Fenced: 409,
}
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
CODES = {
    400: "invalid_body",
    404: "route_not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
}
RETRY_AFTER_S = "2"


def status_of(error: HeliostatError) -> int:
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def body(request: Request, status: int, error: HeliostatError) -> dict[str, Any]:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    shown: dict[str, Any] = {
        "message": error.message,
        "type": kind,
        "param": error.param,
        "code": error.code,
        "hint": error.hint,
        "request_id": request_id(request),
    }
    if isinstance(error, DatasetRefused) and error.report is not None:
        shown["report"] = error.report
    return {"error": shown}


def request_id(request: Request) -> str:
    found: str = request.scope.get("heliostat.request_id", "")
    return found


def answer(request: Request, error: HeliostatError, status: int | None = None) -> JSONResponse:
    status = status or status_of(error)
    headers = {"x-request-id": request_id(request)}
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="heliostat"'
    if status == 503:
        headers["retry-after"] = RETRY_AFTER_S
    if status in (409, 429):  # deterministic here: the same request again gets the same answer
        headers["x-should-retry"] = "false"
    return JSONResponse(body(request, status, error), status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    app.add_exception_handler(HeliostatError, _on_ours)  # type: ignore[arg-type]  # Starlette types by Exception
    app.add_exception_handler(EnvironmentProblem, _on_environment)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _on_invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _on_http)  # type: ignore[arg-type]
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)


async def _on_ours(request: Request, error: HeliostatError) -> JSONResponse:
    return answer(request, error)


async def _on_environment(request: Request, problem: EnvironmentProblem) -> JSONResponse:
    if problem.fixable_by == "user":
        told = HeliostatError(problem.message, code=problem.code, param="environment", hint=problem.hint)
        return answer(request, told, 422)
    return answer(request, Unavailable(problem.message, code=problem.code, hint=problem.hint))


async def _on_http(request: Request, error: HTTPException) -> JSONResponse:
    """Starlette's own: unknown routes, methods; and FastAPI's 400 that hides what the reading of a body raised."""
    status, cause = error.status_code, error.__cause__
    if isinstance(cause, HeliostatError):
        known = status_of(cause)
        return answer(request, cause, known if known != 500 else status)
    told = HeliostatError(
        "the body cannot be read" if status == 400 else HTTPStatus(status).phrase.lower(),
        code=CODES.get(status, "invalid_request"),
        hint="See /docs for what there is and what it takes.",
    )
    shown = answer(request, told, status)
    shown.headers.update(error.headers or {})
    return shown


async def _on_disconnect(request: Request, _error: Exception) -> JSONResponse:
    """The client left while it sent its body: nobody reads this, and it is no fault of ours."""
    return answer(request, HeliostatError("the body ended too early", code="incomplete_body"), 400)


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    log.error("request %s failed: %s", request_id(request), type(error).__name__, exc_info=error)
    told = HeliostatError(
        "an error of ours; it was logged under the request id", hint="Tell an operator the request id."
    )
    return answer(request, told, 500)


async def _on_invalid(request: Request, invalid: RequestValidationError) -> JSONResponse:
    told = told_of(invalid.errors())
    return answer(request, told, 400 if told.code == "invalid_json" else 422)
