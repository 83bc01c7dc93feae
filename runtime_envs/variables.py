"""Names shared by the node's processes, in a module that imports nothing: the supervisor needs them before Ray runs."""

from __future__ import annotations

ROOT_VARIABLE = "HELIOSTAT_ENV_ROOT"
"""The root of `HostEnvironments` on this node; set for every raylet."""
FINGERPRINT_VARIABLE = "HELIOSTAT_ENV_FINGERPRINT"
PREFIX_VARIABLE = "HELIOSTAT_ENV_PREFIX"

PLUGIN_NAME = "tenant_env"
"""The key in a Ray `runtime_env`; its value is a fingerprint."""
PLUGIN_CONFIG = '[{"class": "runtime_envs.ray_plugin.TenantEnvPlugin"}]'
"""The value of RAY_RUNTIME_ENV_PLUGINS in the environment of `ray start`."""
