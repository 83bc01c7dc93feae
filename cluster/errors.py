"""The one error tree of Heliostat. Every error has a stable code and says what to do.

HeliostatError
├── InvalidRequest        what was asked for is wrong                      422
│   ├── ResourceError     it fits nowhere                                  422
│   └── EnvironmentError_ an environment whose file must change            422
├── NotFound              no such object, or another tenant's              404
├── Conflict              the object is in a state that forbids it         409
├── TooLarge              a body or file over its limit                    413
├── Unauthorized          no token, or one that does not hold              401
├── Forbidden             a token that does not allow it                   403
├── QuotaExceeded         the tenant's allowance is used up                429
├── Unavailable           a part that is needed is down; try again         503
├── Fenced                a stale attempt or epoch wrote; it must stop     409
└── JobFailure            a training that cannot go on                     (never leaves as HTTP)

HTTP status is decided in one table, `app.errors`. Errors are picklable: they cross Ray.
"""

from __future__ import annotations

from typing import Any, Literal

FixableBy = Literal["user", "operator", "nobody"]


class HeliostatError(Exception):
    """`message` says what happened and why, `hint` what to do, `param` which field of the request."""

    code = "internal_error"
    fixable_by: FixableBy = "operator"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        hint: str | None = None,
        fixable_by: FixableBy | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.hint = hint
        self.fixable_by = fixable_by or type(self).fixable_by

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.code, self.param, self.hint, self.fixable_by)

    def as_dict(self) -> dict[str, str | None]:
        """The `error` of a job object."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "hint": self.hint,
            "fixable_by": self.fixable_by,
        }


def _rebuild(
    kind: type[HeliostatError], message: str, code: str, param: str | None, hint: str | None, fixable_by: FixableBy
) -> HeliostatError:
    return kind(message, code=code, param=param, hint=hint, fixable_by=fixable_by)


class InvalidRequest(HeliostatError):
    code = "invalid_request"
    fixable_by: FixableBy = "user"


class ResourceError(InvalidRequest):
    code = "resource_unavailable"


class EnvironmentError_(InvalidRequest):
    code = "environment_unsolvable"


class NotFound(HeliostatError):
    code = "not_found"
    fixable_by: FixableBy = "user"


class Conflict(HeliostatError):
    code = "conflict"
    fixable_by: FixableBy = "user"


class TooLarge(HeliostatError):
    code = "too_large"
    fixable_by: FixableBy = "user"


class Unauthorized(HeliostatError):
    code = "unauthorized"
    fixable_by: FixableBy = "user"


class Forbidden(HeliostatError):
    code = "forbidden"
    fixable_by: FixableBy = "user"


class QuotaExceeded(HeliostatError):
    code = "quota_exceeded"
    fixable_by: FixableBy = "operator"


class Unavailable(HeliostatError):
    code = "unavailable"
    fixable_by: FixableBy = "operator"


class Fenced(HeliostatError):
    code = "fenced"
    fixable_by: FixableBy = "nobody"


class JobFailure(HeliostatError):
    code = "job_failed"
    fixable_by: FixableBy = "user"
