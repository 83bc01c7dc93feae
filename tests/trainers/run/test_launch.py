"""A driver, a Train worker and the real child on a small real Ray: from start to a stored model, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders_llama import make_tiny_llama
from fakes_driver import ENVIRONMENT

pytestmark = pytest.mark.integration

RAY_JOBS_S = 600.0
"""For three jobs, one after the other."""
HERE = Path(__file__).parent
TESTS = HERE.parents[1]


def free_port() -> int:
    """Below the range from which the kernel hands out ports: nobody takes it between this look and its use."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """The fingerprint comes from here instead of the plug-in, whose test is in tests/runtime_envs."""
    token = tmp_path / "ray.token"
    token.touch(mode=0o600)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    token.write_text(secrets.token_hex(32))
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), str(HERE)]),
        "HELIOSTAT_TEST_ROOT": str(tmp_path),
        "HELIOSTAT_ENV_FINGERPRINT": ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(temporary),
    }


@pytest.fixture
def head(variables: dict[str, str]) -> Iterator[str]:
    """The address of a Ray head of our own with a second node beside it, both ended by their ids."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="hr", dir="/tmp") as folder:  # Ray's socket paths must be short
        first = start_ray(
            Path(folder, "n1.log"),
            variables,
            *("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"),
            *(f"--ray-client-server-port={free_port()}", "--labels=heliostat-node=n1"),
            f"--resources={json.dumps({'heliostat_control': 1})}",
        )
        nodes = [first]
        try:
            wait_for_port(port, first, Path(folder, "n1.log"))
            second = (f"--address=127.0.0.1:{port}", "--labels=heliostat-node=n2")
            nodes.append(start_ray(Path(folder, "n2.log"), variables, *second))
            yield f"127.0.0.1:{port}"
        finally:
            for node in reversed(nodes):
                node.send_signal(signal.SIGTERM)
            for node in nodes:
                node.wait(300)  # it ends a dozen processes one after the other


def start_ray(log: Path, variables: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--disable-usage-stats"),
        "--object-store-memory=80000000",
        # 0: any free port; the defaults would meet those of another Ray on this machine.
        *("--min-worker-port=0", "--max-worker-port=0", "--metrics-export-port=0"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0"),
        *options,
    ]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=variables, stdout=output, stderr=output)


def wait_for_port(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"the Ray head did not start: {output.read_text()[-2000:]}")


@pytest.mark.timeout(2 * RAY_JOBS_S)
def test_jobs_on_a_real_ray(head: str, variables: dict[str, str], tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "model")
    script = [sys.executable, str(HERE / "ray_job.py"), head, str(model)]
    done = subprocess.run(script, env=variables, capture_output=True, text=True, timeout=RAY_JOBS_S)
    assert done.returncode == 0, done.stderr[-6000:]
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    whole = seen["whole"]
    assert whole["state"] == "succeeded"
    assert whole["steps"] == [1, 2, 3]
    assert whole["checkpoints"][-1] == 3
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(whole["files"])
    assert {"environment", "worker_start", "imports", "load", "first_step"} <= set(whole["stages"])
    over_nodes = seen["two_nodes"]
    assert (over_nodes["state"], over_nodes["error"], over_nodes["ranks"]) == ("succeeded", None, 2)
    assert over_nodes["steps"] == [1, 2, 3]
    assert seen["killed"]["alive"] is False
    assert seen["cancelled"] == {"steps": {}, "alive": False}
    assert seen["killed"]["child_gone_after_s"] < 30
    assert set(seen["groups"]) == {"REMOVED"}
    assert [one.name for one in (tmp_path / "tmp").rglob("*ftjob*")] == []
    print(json.dumps(seen))
