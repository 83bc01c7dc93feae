"""A job that waits has its process already; the slots go to that one, and it computes what any other would."""

from __future__ import annotations

import psutil
import pytest
from heliostat_service import Row, Service, events, explain_failure, job, rows, submit, upload, wait_done, wait_for
from kills import losses, reached

from cluster.processes import MARK_VARIABLE

pytestmark = pytest.mark.integration


def body(steps: int) -> Row:
    hyperparams = {"lr": 1e-3, "batch_size": 4, "epochs": 100, "max_steps": steps, "seed": 7}
    return {
        "base_model": "tiny",
        "dataset_id": "soon",
        "hyperparams": hyperparams,
        "resource_config": {"gpu_type": "cpu", "num_gpus": 2},
    }


def keepers(job_id: str) -> set[psutil.Process]:
    """Parents of children that were started before their workers."""
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        try:
            if (
                "trainers.run.keeper" in (process.info["cmdline"] or [])  # None of a zombie
                and process.environ().get(MARK_VARIABLE) == f"{job_id}/1"
            ):
                found.add(process)
        except psutil.Error:
            continue
    return found


def test_the_process_that_waited_with_its_job_trains(service: Service) -> None:
    client = service.client()
    upload(client, "soon", rows(640))
    alone = submit(client, **body(40))
    assert wait_done(client, alone)["status"] == "succeeded", explain_failure(service, client, alone)

    holder = submit(client, **body(20_000), priority="urgent")
    wait_for(reached(service, holder, 1), 300)
    waiting = submit(client, **body(40))
    ahead = wait_for(lambda: keepers(waiting), 300)
    assert job(client, waiting)["status"] == "queued"
    assert client.post(f"/finetune/{holder}/cancel").status_code in (200, 202)

    wait_for(reached(service, waiting, 2), 300, every_s=0.02)
    assert keepers(waiting) == ahead, "a second child was started, or the first one left"
    assert wait_done(client, waiting)["status"] == "succeeded", explain_failure(service, client, waiting)
    assert [row.loss for row in losses(service, waiting)] == [row.loss for row in losses(service, alone)]
    named = [event["data"]["stage"] for event in events(client, waiting) if event["type"] == "stage"]
    assert {"environment", "worker_start", "first_step"} <= set(named), named
