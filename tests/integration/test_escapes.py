"""Hostile packages in real training jobs, through the API, while another tenant trains beside them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from builders_wheels import write_wheel
from heliostat_service import (
    SETTINGS,
    Service,
    ended,
    explain_failure,
    job,
    rows,
    started,
    submit,
    upload,
    wait_done,
    wait_for,
)

from app.processes import marked
from runtime_envs.errors import BUILD_FAILED
from runtime_envs.sandbox.host import ability

ESCAPES = Path(__file__).parents[1] / "escapes.py"
MARKER = f"left-behind-{os.getpid()}"
TMPFS_GB, PROCESSES = 0.0625, 150
LIMITS = {"SANDBOX__TMP_GB": str(TMPFS_GB), "SANDBOX__SHM_GB": str(TMPFS_GB), "SANDBOX__PROCESSES": str(PROCESSES)}
ENVIRONMENT = "name: {name}\ndependencies:\n  - pip:\n      - escapes=={version}\n"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}; {ability().remedy}"),
]


@dataclass
class Scene:
    """A victim that trains, and an attacker with a slot of its own."""

    service: Service
    shelf: Path
    attacker: httpx.Client
    victim: httpx.Client
    victims_job: str
    targets: dict[str, Any]

    def attack(self, version: str, attack: str, **body: Any) -> tuple[str, dict[str, Any]]:
        """The job that trains with the hostile package, and how it ended."""
        self.hostile_environment(self.attacker, version, attack)
        job_id = train(self.attacker, environment=attack, **body)
        return job_id, wait_done(self.attacker, job_id)

    def hostile_environment(self, client: httpx.Client, version: str, attack: str, **more: str) -> None:
        """`more`: files of the package."""
        source = ESCAPES.read_text().replace("TARGETS = {}", f"TARGETS = { ({**self.targets, 'attack': attack})!r}")
        files = {"escapes.py": source + "\n\non_import()\n", "escapes.pth": "import escapes\n"} | more
        write_wheel(self.shelf, "escapes", version, files=files)
        text = ENVIRONMENT.format(name=attack, version=version)
        made = client.post("/environments", content=text, headers={"content-type": "application/yaml"})
        assert made.status_code == 201, made.text

    def unharmed(self) -> None:
        assert not list(self.service.data_dir.rglob("planted"))
        seen = job(self.victim, self.victims_job)
        assert seen["status"] in ("queued", "running", "succeeded") and seen["attempt"] == 1, seen


def train(client: httpx.Client, steps: int = 4, **body: Any) -> str:
    hyper = {"batch_size": 4, "epochs": 100, "max_steps": steps}
    resources = {"num_gpus": 1, **body.pop("resource_config", {})}
    return submit(client, base_model="tiny", dataset_id="first", hyperparams=hyper, resource_config=resources, **body)


@pytest.fixture(scope="module")
def scene(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    shelf = tmp_path_factory.mktemp("hostile")
    settings = {
        **SETTINGS,
        **LIMITS,
        "TRAINING__CHECKPOINT_EVERY_S": "5",
        "ISOLATION": "required",
        "PIP_FIND_LINKS": json.dumps([str(shelf)]),
    }
    service = started(settings)
    try:
        service.add_base_model("tiny", llama)
        victim, attacker = service.tenant("acme"), service.tenant("mallory")
        for client in (victim, attacker):
            upload(client, "first", rows(4000))
        victims_job = train(victim, steps=100_000)
        wait_for(lambda: job(victim, victims_job)["status"] == "running", 300)
        with listening() as name:
            targets = around(service, victims_job) | {"abstract": [name]}
            yield Scene(service, shelf, attacker, victim, victims_job, targets)
        victim.post(f"/finetune/{victims_job}/cancel")
        assert job(victim, victims_job)["attempt"] == 1
    finally:
        ended(service)


class listening:
    """An abstract socket of the host."""

    def __enter__(self) -> str:
        self._socket = socket.socket(socket.AF_UNIX)
        name = f"heliostat-escape-{os.getpid()}"
        self._socket.bind("\0" + name)
        self._socket.listen()
        return name

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def around(service: Service, victims_job: str) -> dict[str, Any]:
    """What lies outside of the attacker's sandbox, and is there: each file, port and process is looked for first."""
    data = service.data_dir
    victims = [*(data / "objects" / "tenants" / "acme").rglob("*"), *(data / "node" / "jobs" / victims_job).rglob("*")]
    keys = [data / "keys" / "ray.token", data / "keys" / "operator.token", data / "run" / "settings.json"]
    files = [path for path in (*keys, *victims) if path.is_file()]
    assert len(files) > 5 and set(keys) <= set(files)
    processes = marked(service.instance)
    ports = sorted({port for process in processes for port in listens(process)})
    assert len(ports) > 5, "the cluster's own among them"
    address = socket.gethostbyname(socket.gethostname())
    return {
        "files": [str(path) for path in files],
        "ports": ports,
        "hosts": [(address, port) for port in ports],
        "pids": [process.pid for process in processes],
        "read_only": [str(path) for path in (data / "node" / "models").iterdir() if path.is_dir()],
        "tmpfs_bytes": int(2 * TMPFS_GB * 2**30) + 2**20,
        "processes": PROCESSES,
        "marker": MARKER,
    }


def listens(process: psutil.Process) -> list[int]:
    try:
        return [each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.NoSuchProcess:
        return []


def test_nothing_outside_is_reached_at_import_or_while_it_trains(scene: Scene) -> None:
    job_id, seen = scene.attack("1.0", "look")
    assert seen["status"] == "succeeded", explain_failure(scene.service, scene.attacker, job_id)
    log = scene.attacker.get(f"/finetune/{job_id}/logs").text
    assert [len(one) for one in told(log)] == [15, 16], log[-2000:]
    assert escaped(told(log)) == []
    scene.unharmed()


def told(output: str) -> list[dict[str, str]]:
    return [json.loads(line.partition("ESCAPES ")[2]) for line in output.splitlines() if "ESCAPES " in line]


def escaped(results: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(name, result) for one in results for name, result in one.items() if not result.startswith("held")]


def test_env_run_is_sealed_as_a_training_is(scene: Scene) -> None:
    scene.hostile_environment(scene.service.client(), "5.0", "look")
    done = scene.service.heliostat(
        *("env", "run", "look", "--data-dir", str(scene.service.data_dir), "--", "python", "-c", "print('mine')")
    )
    assert done.stdout.splitlines()[-1] == "mine"
    assert [len(one) for one in told(done.stdout)] == [15] and escaped(told(done.stdout)) == []


def test_nobody_stays_behind_when_the_job_has_ended(scene: Scene) -> None:
    job_id, seen = scene.attack("2.0", "leave")
    assert seen["status"] == "succeeded", explain_failure(scene.service, scene.attacker, job_id)
    wait_for(lambda: not left_behind(), 300)
    scene.unharmed()


def left_behind() -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and MARKER in (process.info["cmdline"] or []):
            found.append(process.pid)
    return found


def test_who_takes_too_much_memory_is_ended_alone(scene: Scene) -> None:
    job_id, seen = scene.attack("3.0", "hog", steps=100_000, resource_config={"mem_limit_gb": 1})
    assert seen["status"] == "failed", explain_failure(scene.service, scene.attacker, job_id)
    assert seen["error"]["code"] == "memory_limit_exceeded"
    assert "GiB of the node's memory" in seen["error"]["message"], "of the whole tree, not of the process that trains"
    scene.unharmed()


def test_links_among_its_files_are_not_followed(scene: Scene) -> None:
    job_id, seen = scene.attack("4.0", "link")
    assert seen["status"] == "failed", explain_failure(scene.service, scene.attacker, job_id)
    assert seen["error"]["code"] == "output_refused"
    scene.unharmed()


def test_a_package_that_brings_what_the_platform_believes_is_refused_whole(scene: Scene) -> None:
    victim = scene.service.data_dir / "victim"
    victim.touch()
    climbing = "../" * 40 + str(victim).lstrip("/")
    record = {"name": "zzz", "fn": "zzz-1.0-0.conda", "paths_data": {"paths": [{"_path": climbing}]}}
    files = {"escapes-6.0.data/data/conda-meta/zzz-1.0-0.json": json.dumps(record)}
    scene.hostile_environment(scene.attacker, "6.0", "believed", **files)
    seen = wait_done(scene.attacker, train(scene.attacker, environment="believed"))
    assert seen["status"] == "failed" and seen["error"]["code"] == BUILD_FAILED, seen
    assert "`escapes-6.0`" in seen["error"]["message"] and "conda-meta/zzz-1.0-0.json" in seen["error"]["message"]
    assert victim.exists()
    scene.unharmed()
