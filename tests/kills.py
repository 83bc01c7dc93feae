"""Finding and killing the parts of a running Heliostat, and comparing what a job computed with an undisturbed run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import psycopg
from heliostat_service import Row, Service, events, submit, wait_done, wait_for

from trainers.protocol import MARK_VARIABLE

STEPS = 300
TWO_SLOTS = {
    "base_model": "tiny",
    "dataset_id": "colours",
    "hyperparams": {"lr": 1e-3, "batch_size": 4, "epochs": 100, "max_steps": STEPS, "seed": 7},
    "resource_config": {"gpu_type": "cpu", "num_gpus": 2},
}


@dataclass(frozen=True)
class StepLoss:
    step: int
    loss: float
    attempt: int


def losses(service: Service, job_id: str) -> list[StepLoss]:
    """Every row of `steps`, read from the database itself: an API cannot hide a second row."""
    with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
        rows = connection.execute(
            "SELECT step, loss, attempt FROM steps WHERE job_id = %s ORDER BY step", [job_id]
        ).fetchall()
    return [StepLoss(*row) for row in rows]


def reached(service: Service, job_id: str, step: int) -> Callable[[], bool]:
    """Also one durable checkpoint: what is killed then must go on from there, not from the start."""

    def look() -> bool:
        try:
            done = losses(service, job_id)
            with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
                kept = connection.execute("SELECT count(*) FROM checkpoints WHERE job_id = %s", [job_id]).fetchone()
        except psycopg.OperationalError:
            return False
        return bool(done) and done[-1].step >= step and kept is not None and kept[0] > 0

    return look


def starts(client: httpx.Client, job_id: str) -> list[int]:
    """The step from which each attempt went on."""
    return [event["data"]["start_step"] for event in events(client, job_id) if event["type"] == "ready"]


def run_undisturbed(service: Service) -> list[StepLoss]:
    client = service.client()
    job_id = submit(client, **TWO_SLOTS)
    seen = wait_done(client, job_id)
    assert seen["status"] == "succeeded", seen
    return losses(service, job_id)


def run_with_kill(service: Service, target: str, step: int, timeout_s: float = 240) -> tuple[str, list[StepLoss]]:
    """One job, one SIGKILL of `target` after `step`; (job id, its steps). Raises AssertionError when it does not succeed."""
    client = service.client()
    job_id = submit(client, **TWO_SLOTS)
    wait_for(reached(service, job_id, step), 300)
    kill(service, target, job_id)
    if target == "supervisor":  # nobody is left to start anything: an operator does, and finds all as it was
        service.up()
        client = service.client()
    seen: Row = wait_done(client, job_id, timeout_s)
    assert seen["status"] == "succeeded", (seen["error"], [event["message"] for event in events(client, job_id)])
    first, *later = starts(client, job_id)
    assert first == 0 and all(later), f"a recovered job goes on from its checkpoint, not from {later}"
    assert later or target not in ENDS_THE_ATTEMPT, "what was killed did not matter"
    return job_id, losses(service, job_id)


def check_same(undisturbed: list[StepLoss], disturbed: list[StepLoss]) -> None:
    assert [row.step for row in disturbed] == list(range(1, STEPS + 1)), "one row per step"
    assert [row.loss for row in disturbed] == [row.loss for row in undisturbed], "the same number at every step"


def kill(service: Service, target: str, job_id: str) -> None:
    """SIGKILL to every process of the target. Raises AssertionError when there is none."""
    pids = TARGETS[target](service, job_id)
    assert pids, f"no process to kill: {target}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _child(_service: Service, job_id: str) -> list[int]:
    mark = f"{MARK_VARIABLE}={job_id}/".encode()
    found = []
    for pid in psutil.pids():
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found[-1:]  # one rank: the others must notice


def _titled(*words: str) -> Callable[[Service, str], list[int]]:
    def find(service: Service, _job_id: str) -> list[int]:
        return service.pids(lambda process: any(word in " ".join(process.cmdline()) for word in words))

    return find


def _supervisor(service: Service, _job_id: str) -> list[int]:
    return [int(service.state()["pid"])]


def _component(name: str) -> Callable[[Service, str], list[int]]:
    def find(service: Service, _job_id: str) -> list[int]:
        return [int(service.state()["components"][name]["pid"])]

    return find


TARGETS: dict[str, Callable[[Service, str], list[int]]] = {
    "child": _child,
    "driver": _titled("ray::DriverActor", "ray::JobDriver"),
    "scheduler": _titled("ray::SchedulerActor"),
    "agent": _titled("ray::AgentActor"),
    "serve replica": _titled("ray::ServeReplica"),
    "postgres": _component("postgres"),
    "control": _component("control"),
    "ray head": _titled("gcs_server", "/raylet/raylet"),
    "supervisor": _supervisor,
}

ENDS_THE_ATTEMPT = ("child", "driver", "ray head", "supervisor")
