"""The actors on a real Ray of our own: they come up, and come back when their processes are killed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
import wiring_cluster
from builders_cluster import a_job, gang
from fakes_cluster import FileStore
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.exceptions import RayError
from waiting import asked, until

from cluster import client
from cluster.core.job import JobState
from cluster.errors import EnvironmentError_, Unavailable

pytestmark = pytest.mark.integration

PORTS = (
    *("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc"),
    *("runtime-env-agent", "metrics-export"),
)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _start_ray(folder: Path, port: int) -> subprocess.Popen[bytes]:
    tests = Path(wiring_cluster.__file__).parent
    environment = {
        **os.environ,  # with the token
        wiring_cluster.FOLDER_VARIABLE: str(folder),
        "PYTHONPATH": str(tests),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(Path(sys.executable).with_name("ray")),
        *("start", "--head", "--block", f"--port={port}", "--num-cpus=2", f"--temp-dir={folder}"),
        *("--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"),
        *("--min-worker-port=0", "--max-worker-port=0", f"--labels={client.NODE_LABEL}=n1"),
        *(f'--resources={{"{client.CONTROL_RESOURCE}": 1}}', *(f"--{name}-port={_free_port()}" for name in PORTS)),
    ]
    with (folder / "ray.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _set_token(file: Path, environment: pytest.MonkeyPatch) -> None:
    """A cluster with a token of its own, whatever the home folder of this machine holds."""
    file.write_text("0" * 64)
    file.chmod(0o600)
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    environment.delenv("RAY_AUTH_TOKEN", raising=False)
    reset_auth_token_state()  # a process reads its token once; earlier tests may have


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ray's head and all that it started."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        if member.is_running():
            member.kill()
    process.wait(60)
    psutil.wait_procs(family, 60)


@pytest.fixture(scope="module")
def store() -> Iterator[FileStore]:
    folder = Path(tempfile.mkdtemp(prefix="hc-"))  # short: Ray puts unix sockets below it
    port = _free_port()
    environment = pytest.MonkeyPatch()
    _set_token(folder / "token", environment)
    head = _start_ray(folder, port)
    try:
        log = folder / "ray.log"
        until(lambda: b"Ray runtime started" in log.read_bytes() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        client.connect(f"127.0.0.1:{port}")
        client.ensure_agents(wiring_cluster.agent_parts)
        client.ensure_scheduler(wiring_cluster.scheduler_parts)
        yield FileStore(folder / "rows.pickle")
    finally:
        ray.shutdown()
        _end(head)
        environment.undo()
        reset_auth_token_state()
        shutil.rmtree(folder, ignore_errors=True)


def _pid_of(actor_class: str) -> int:
    [pid] = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith(f"ray::{actor_class}")
        and wiring_cluster.FOLDER_VARIABLE in asked(process.environ, {})
    ]
    return pid


def _granted(store: FileStore) -> list[tuple[str, int]]:
    return sorted(store.look().leases)


def _named_actors() -> set[str]:
    return {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}


def test_jobs_are_granted_on_the_agents_node_and_recovered(store: FileStore) -> None:
    store.queue(a_job("ftjob-a", gang(1)))
    until(lambda: _granted(store) == [("ftjob-a", 1)])
    until(lambda: "ftjob-a/1" in client.scheduler_state()["running"])
    store.move("ftjob-a", JobState.RUNNING)
    until(lambda: "driver-ftjob-a-1" in _named_actors())  # granted is not yet started
    ray.kill(ray.get_actor("driver-ftjob-a-1", client.NAMESPACE))
    until(lambda: _granted(store) == [("ftjob-a", 2)])
    assert store.look().reasons == ["its driver is gone"]


def test_a_killed_scheduler_comes_back_and_goes_on(store: FileStore) -> None:
    epoch = store.look().epoch
    os.kill(_pid_of("SchedulerActor"), 9)
    store.queue(a_job("ftjob-b", gang(1)))
    until(lambda: ("ftjob-b", 1) in _granted(store))
    assert store.look().epoch == epoch + 1
    assert len(_granted(store)) == 2


def test_a_killed_agent_comes_back_and_its_node_with_it(store: FileStore) -> None:
    killed = _pid_of("AgentActor")
    os.kill(killed, 9)
    until(_answers)
    assert _pid_of("AgentActor") != killed
    store.move("ftjob-b", JobState.SUCCEEDED)
    until(lambda: ("ftjob-b", 1) not in _granted(store))


def _answers() -> bool:
    try:
        report: Any = client.ask(client.node_agent("n1").report.remote(), 5)
    except Unavailable:
        return False
    return bool(report.node.name == "n1")


def test_a_node_names_a_port_of_its_own_where_others_reach_it(store: FileStore) -> None:
    address, port = client.ask(client.node_agent("n1").meeting_point.remote(), 30).split(":")
    with socket.socket() as listener:
        listener.bind((address, int(port)))  # nobody else has it
        assert listener.getsockname() == (address, int(port))


def test_a_check_that_fails_on_a_node_keeps_its_own_words(store: FileStore) -> None:
    assert client.check_environment("elsewhere", False) == {}
    found = client.check_environment("broken", False)["n1"]
    assert isinstance(found, EnvironmentError_) and not isinstance(found, RayError)
    assert (found.code, found.message, found.hint) == ("environment_check_failed", "it was killed", "try again")


def test_what_is_not_there_is_unavailable(store: FileStore) -> None:
    with pytest.raises(Unavailable) as caught:
        client.node_agent("n2")
    assert caught.value.code == "ray_unavailable"
    assert client.RayNodes().end_attempt("n2", "ftjob-a", 1) is None


def test_prometheus_finds_the_jobs_of_a_tenant(store: FileStore) -> None:
    [node] = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    wanted = ("heliostat_jobs{", "heliostat_job_queue_wait_seconds_count{")
    lines: list[str] = []

    def exported() -> bool:
        lines[:] = [
            line
            for line in httpx.get(url, timeout=60).text.splitlines()
            if line.startswith(("heliostat", "ray_heliostat"))
        ]
        return all(any(name in line for line in lines) for name in wanted)

    until(exported)
    assert all('tenant="' in line and "ftjob" not in line for line in lines)
