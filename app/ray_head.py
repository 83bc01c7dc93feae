"""How the Ray head is started: its own ports and token, nothing open that need not be, tenants' environments as a plug-in."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
from pathlib import Path

from app.processes import free_port
from app.settings import Settings
from runtime_envs.variables import PLUGIN_CONFIG

NODE_NAME = "local"
OBJECT_STORE_BYTES = 256 * 1024**2
"""Small: no rows, weights or bodies pass through it."""


def token_file(settings: Settings) -> Path:
    return settings.data_dir / "keys" / "ray.token"


def make_token(settings: Settings) -> None:
    """Whole or not at all: an empty one, left by a kill in between, would lock Ray for good."""
    file = token_file(settings)
    if not file.exists() or not file.stat().st_size:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = file.with_suffix(".new")
        aside.unlink(missing_ok=True)
        aside.touch(mode=0o600)
        aside.write_text(secrets.token_hex(32))
        aside.replace(file)


def temp_dir(settings: Settings) -> Path:
    """Short, because unix sockets lie in it; one per start, so that nothing of an earlier head is met."""
    return settings.ray.temp_dir or Path(tempfile.mkdtemp(prefix="hs-"))


def environment(settings: Settings, scratch: Path) -> dict[str, str]:
    """Variables for the Ray head and every process that connects to it."""
    haproxy = scratch / "haproxy"
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file(settings)),
        "RAY_RUNTIME_ENV_PLUGINS": PLUGIN_CONFIG,
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # 15 by default, which training children would inherit
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        # Train's own defaults wait ten minutes for a dead worker and one for a group to start.
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def command(settings: Settings, scratch: Path) -> list[str]:
    """`ray start --head --block`, on `settings.ray`'s ports (resolved, not 0)."""
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={settings.ray.port}",
        f"--temp-dir={scratch}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={settings.ray.dashboard_port}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}",
        f"--runtime-env-agent-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
        f"--resources={json.dumps({'heliostat_control': 1000, 'heliostat_node': 1000})}",
        f"--labels=heliostat-node={NODE_NAME}",
    ]
