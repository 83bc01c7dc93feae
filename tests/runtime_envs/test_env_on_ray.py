"""One small real Ray: a task that asks for an environment runs where the plugin says, and nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime_envs.lock import default_lock
from runtime_envs.materialize import HostEnvironments, Prepared
from runtime_envs.variables import PLUGIN_CONFIG, ROOT_VARIABLE

pytestmark = pytest.mark.integration

# In a process of its own: Ray reads its environment once, and its warnings are not ours to fix.
DRIVER = """
import json, os, sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=sys.argv[1], log_to_driver=False, configure_logging=False)

@ray.remote(num_cpus=0.1)
def look():
    return {name: os.environ.get(name) for name in ("HELIOSTAT_ENV_FINGERPRINT", "HELIOSTAT_ENV_PREFIX")}

found = ray.get(look.options(runtime_env={"tenant_env": sys.argv[2]}).remote(), timeout=60)
try:
    ray.get(look.options(runtime_env={"tenant_env": "0" * 64}).remote(), timeout=60)
    refused = ""
except ray.exceptions.RuntimeEnvSetupError as error:
    refused = str(error)
print(json.dumps({"found": found, "refused": refused}))
ray.shutdown()
"""


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as folder:  # Ray's socket paths must be short
        yield Path(folder)


@pytest.fixture
def prepared(environments: HostEnvironments) -> Prepared:
    return environments.materialize(default_lock())


def test_a_task_gets_its_environment(prepared: Prepared, temp_dir: Path, tmp_path: Path) -> None:
    environ = {
        **os.environ,
        ROOT_VARIABLE: str(tmp_path / "node"),
        "RAY_RUNTIME_ENV_PLUGINS": PLUGIN_CONFIG,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(temp_dir), prepared.fingerprint],
        env=environ, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["found"] == {
        "HELIOSTAT_ENV_FINGERPRINT": prepared.fingerprint,
        "HELIOSTAT_ENV_PREFIX": str(prepared.prefix),
    }
    assert "is not on this node" in answer["refused"]
