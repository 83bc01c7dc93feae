"""The one error of `runtime_envs`. It knows no HTTP and nothing of `cluster`; the app maps it to its own error tree."""

from __future__ import annotations

from typing import Any, Literal

FixableBy = Literal["user", "operator"]

INVALID = "environment_invalid"
"""The file cannot be read as an environment."""
UNSUPPORTED = "environment_unsupported"
"""Understood, but outside of what Heliostat trains with."""
UNSOLVABLE = "environment_unsolvable"
"""No set of packages meets the file together with the base."""
INDEX_FAILED = "environment_index_failed"
"""The package index did not answer as it should."""
CHANNEL_FAILED = "environment_channel_failed"
"""A conda channel did not deliver."""
DISK_FULL = "environment_disk_full"
BASE_CHANGED = "environment_base_changed"
"""The lock was made for another version of the platform than this node has."""
BASE_UNAVAILABLE = "environment_base_unavailable"
"""This Heliostat's channels do not have what the base is made of."""
BUILD_FAILED = "environment_build_failed"
DAMAGED = "environment_damaged"
CHECK_FAILED = "environment_check_failed"
"""Whether it is damaged could not be found out."""
NOT_READY = "environment_not_ready"
BUNDLE_INVALID = "environment_bundle_invalid"
"""Not a bundle, or one that was changed."""
BUNDLE_UNTRUSTED = "environment_bundle_untrusted"
"""Signed by nobody whom an operator trusts."""


class EnvironmentProblem(Exception):
    """`message` says what and why, `hint` what to do, `line` (from 1) where in environment.yml, when it is there."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        hint: str | None = None,
        line: int | None = None,
        fixable_by: FixableBy = "user",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.line = line
        self.fixable_by: FixableBy = fixable_by

    def __reduce__(self) -> tuple[Any, ...]:
        # It crosses Ray: keyword arguments do not survive the default pickling of exceptions.
        return _rebuild, (self.code, self.message, self.hint, self.line, self.fixable_by)


def _rebuild(code: str, message: str, hint: str | None, line: int | None, fixable_by: FixableBy) -> EnvironmentProblem:
    return EnvironmentProblem(code, message, hint=hint, line=line, fixable_by=fixable_by)
