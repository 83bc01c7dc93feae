"""What can go wrong on the client's side, and the exit code of every error. Services' own errors arrive as `ServiceError`."""

from __future__ import annotations

from typing import Any

import httpx

from cluster.errors import Forbidden, HeliostatError, InvalidRequest, NotFound, QuotaExceeded, Unauthorized

DONE = 0
JOB_FAILED = 1
WRONG_USE = 2
UNREACHABLE = 3
REFUSED = 4
JOB_CANCELLED = 5
DETACHED = 130

REFUSING = frozenset({401, 403, 429})


class Unreachable(HeliostatError):
    """The service did not answer, or said again and again that it cannot."""

    code = "service_unreachable"


class HostProblem(HeliostatError):
    """Something on this machine is in the way: a port, a folder, a process."""

    code = "host_problem"


class Corrupt(HeliostatError):
    """What arrived is not what was sent."""

    code = "checksum_mismatch"


class ServiceError(HeliostatError):
    """An error that the service answered with. `status` is HTTP's, `body` the error object as it came."""

    status: int = 500
    request_id: str | None = None
    body: dict[str, Any]

    @classmethod
    def of(cls, response: httpx.Response) -> ServiceError:
        """The body of the response must have been read."""
        body = _error_object(response)
        error = cls(
            str(body.get("message") or f"the service answered {response.status_code} {response.reason_phrase}"),
            code=body.get("code") or f"http_{response.status_code}",
            param=body.get("param"),
            hint=body.get("hint"),
        )
        error.status = response.status_code
        error.request_id = body.get("request_id") or response.headers.get("x-request-id")
        error.body = {**error.as_dict(), **body, "request_id": error.request_id}
        return error


def _error_object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        return {}  # a proxy's page, not ours
    error = body.get("error") if isinstance(body, dict) else None
    return error if isinstance(error, dict) else {}


def exit_code(error: HeliostatError) -> int:
    """One table for all commands."""
    if isinstance(error, ServiceError):
        if error.status in REFUSING:
            return REFUSED
        return UNREACHABLE if error.status >= 500 else WRONG_USE
    if isinstance(error, Unreachable):
        return UNREACHABLE
    if isinstance(error, Unauthorized | Forbidden | QuotaExceeded):
        return REFUSED
    return WRONG_USE if isinstance(error, InvalidRequest | NotFound) else JOB_FAILED


def error_object(error: HeliostatError) -> dict[str, Any]:
    """What `--json` prints."""
    body = error.body if isinstance(error, ServiceError) else error.as_dict()
    return {"error": body}
