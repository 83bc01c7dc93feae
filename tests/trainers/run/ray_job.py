"""Run by `test_launch.py` in a process of its own, against a small Ray head: one job with the real child to its end, one
whose driver is killed. Prints what it saw as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from fakes_driver import JOB, make_assignment
from waiting import PATIENCE_S
from wiring_run import NAMESPACE, ROOT_VARIABLE, Rows, driver_parts, objects_url, start_agent

from cluster.core.job import JobState, Placement, Wish
from cluster.processes import running_attempts
from cluster.storage.objects import ObjectStore
from trainers.config import Hyperparams
from trainers.run.launch import RayDriverLauncher

ROW = b'{"prompt":"what is the capital of france","completion":"paris"}\n'


def look(rows: Any) -> dict[str, Any]:
    found: dict[str, Any] = ray.get(rows.snapshot.remote(), timeout=30)
    return found


def until(true: Any, timeout_s: float = PATIENCE_S) -> float:
    started = time.monotonic()
    while not true():
        if time.monotonic() - started > timeout_s:
            raise TimeoutError
        time.sleep(0.05)
    return round(time.monotonic() - started, 2)


def main() -> None:
    ray.init(address=sys.argv[1], namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    model = {file.name: file.read_bytes() for file in Path(sys.argv[2]).iterdir()}
    storage = ObjectStore(objects_url())
    launcher = RayDriverLauncher(driver_parts)
    agents = [start_agent(node) for node in ("n1", "n2")]
    ray.get([agent.report.remote() for agent in agents], timeout=60)
    seen = {
        "whole": whole_job(launcher, storage, model),
        "killed": killed_job(launcher, storage, model),
        "cancelled": cancelled_job(launcher, storage, model),
        "two_nodes": whole_job(launcher, storage, model, {"n1": (0,), "n2": (0,)}),
    }
    until(lambda: not left_actors())
    until(lambda: set(groups()) == {"REMOVED"})  # some moments after the actors that were in them
    print(json.dumps({**seen, "groups": groups()}))


def groups() -> list[str]:
    return [group["state"] for group in ray.util.placement_group_table().values()]


def left_actors() -> list[str]:
    """Of attempts."""
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if name.startswith("job-")]


Slots = dict[str, tuple[int, ...]]
ONE_NODE: Slots = {"n1": (0,)}


def rows_of(storage: ObjectStore, model: dict[str, bytes], steps: int, nodes: Slots = ONE_NODE) -> Any:
    hyper = Hyperparams(max_steps=steps, batch_size=2)
    given = make_assignment(storage, model, rows=ROW * 4, hyperparams=hyper, placement=Placement(nodes))
    return ray.remote(Rows).options(name="rows", namespace=NAMESPACE, num_cpus=0).remote(given)


def whole_job(
    launcher: RayDriverLauncher, storage: ObjectStore, model: dict[str, bytes], nodes: Slots = ONE_NODE
) -> dict[str, Any]:
    rows = rows_of(storage, model, 3, nodes)
    launcher.start(JOB, 1)
    launcher.start(JOB, 1)
    alive = until(lambda: launcher.alive(JOB, 1) is True)
    seconds = until(lambda: look(rows)["state"] in (JobState.SUCCEEDED, JobState.FAILED, JobState.RECOVERING))
    until(lambda: launcher.alive(JOB, 1) is False)
    launcher.end(JOB, 1)
    made = look(rows)
    ray.kill(rows)
    return {
        "alive_after_s": alive,
        "seconds": seconds,
        "state": made["state"],
        "error": made["error"],
        "ranks": (made["result"] or {}).get("lineage", {}).get("world_size"),
        "steps": sorted(made["steps"]),
        "checkpoints": [checkpoint.step for checkpoint in made["checkpoints"]],
        "stages": {data["stage"]: data["seconds"] for type, _, data in made["events"] if type == "stage"},
        "files": sorted(made["result"]["files"]) if made["result"] else [],
    }


def killed_job(launcher: RayDriverLauncher, storage: ObjectStore, model: dict[str, bytes]) -> dict[str, Any]:
    rows = rows_of(storage, model, steps=100_000)
    launcher.start(JOB, 1)
    until(lambda: look(rows)["steps"])
    until(lambda: len(of_job()) == 2)  # the driver and the worker: nothing of Train's own
    launcher.end(JOB, 1)
    gone = until(lambda: (JOB, 1) not in running_attempts())
    alive = launcher.alive(JOB, 1)
    ray.kill(rows)
    return {"child_gone_after_s": gone, "alive": alive}


def cancelled_job(launcher: RayDriverLauncher, storage: ObjectStore, model: dict[str, bytes]) -> dict[str, Any]:
    """While Ray starts its worker."""
    rows = rows_of(storage, model, steps=100_000)
    launcher.start(JOB, 1)
    until(lambda: any(type == "stage" and data["stage"] == "staging" for type, _, data in look(rows)["events"]))
    ray.get(rows.change.remote(wish=Wish.CANCEL), timeout=30)
    until(lambda: look(rows)["state"] is JobState.CANCELLED)
    until(lambda: not of_job())
    seen = {"steps": look(rows)["steps"], "alive": launcher.alive(JOB, 1)}
    ray.kill(rows)
    return seen


def of_job() -> list[str]:
    """This cluster's processes that Ray made for a job's actors."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            here = title.startswith("ray::") and process.environ().get(ROOT_VARIABLE) == os.environ[ROOT_VARIABLE]
            if here and any(part in title for part in ("Driver", "Train", "Synchronization")):
                found.append(title)
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
