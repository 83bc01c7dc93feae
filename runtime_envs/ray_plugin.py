"""Ray's side of an environment: `runtime_env={"tenant_env": <fingerprint>}` asserts that the node has it, and tells the
worker where. The worker keeps the platform's Python; only its child runs in the prefix. Nothing is created here."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Any

from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from runtime_envs.errors import DAMAGED, NOT_READY, EnvironmentProblem
from runtime_envs.variables import FINGERPRINT_VARIABLE, PLUGIN_CONFIG, PLUGIN_NAME, PREFIX_VARIABLE, ROOT_VARIABLE
from runtime_envs.verify import PREFIX, is_ready, quick_verify

__all__ = ["PLUGIN_CONFIG", "TenantEnvPlugin"]


class TenantEnvPlugin(RuntimeEnvPlugin):
    """It names no URIs: Ray would skip `create` for a URI that it has seen, and with it the check."""

    name = PLUGIN_NAME

    @staticmethod
    def validate(runtime_env_dict: dict[str, Any]) -> None:
        value = runtime_env_dict.get(PLUGIN_NAME)
        if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
            raise ValueError(f"{PLUGIN_NAME} must be a fingerprint (64 hexadecimal digits), not {value!r}")

    async def create(
        self, uri: str | None, runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> float:
        """Runs in the event loop of Ray's agent, so the check of tens of thousands of files goes to a thread. Ray
        remembers a failure for ten minutes: drivers ask only for what every node has reported as ready."""
        await asyncio.to_thread(check, _home(runtime_env[PLUGIN_NAME]))
        return 0

    def modify_context(
        self, uris: list[str], runtime_env: Any, context: RuntimeEnvContext, logger: logging.Logger
    ) -> None:
        fingerprint = runtime_env[PLUGIN_NAME]
        context.env_vars[FINGERPRINT_VARIABLE] = fingerprint
        context.env_vars[PREFIX_VARIABLE] = str(_home(fingerprint) / PREFIX)


def check(home: Path) -> None:
    """Raises EnvironmentProblem `environment_not_ready` or `environment_damaged`."""
    if not is_ready(home):
        raise EnvironmentProblem(
            NOT_READY, f"Environment {home.name} is not on this node.",
            hint="The node agent makes it before the worker group starts; see its log.", fixable_by="operator",
        )  # fmt: skip
    if damaged := quick_verify(home):
        raise EnvironmentProblem(
            DAMAGED, f"Environment {home.name} is damaged: {', '.join(damaged[:3])} ({len(damaged)} files).",
            fixable_by="operator",
        )  # fmt: skip


def _home(fingerprint: str) -> Path:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        raise EnvironmentProblem(
            NOT_READY, f"{ROOT_VARIABLE} is not set on this node.",
            hint="Start its raylet through Heliostat.", fixable_by="operator",
        )  # fmt: skip
    return Path(root) / "envs" / fingerprint
