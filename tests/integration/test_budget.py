"""A budget, through every real process: stopped at a checkpoint, resumed with a larger one, and not a number differs."""

from __future__ import annotations

import pytest
from heliostat_service import Row, Service, events, explain_failure, job, rows, submit, upload, wait_done, wait_for
from kills import losses

pytestmark = pytest.mark.integration

BODY = {
    "base_model": "tiny",
    "dataset_id": "thrift",
    "hyperparams": {"lr": 1e-3, "batch_size": 1, "max_steps": 1500, "epochs": 100},
}


def test_a_job_stops_at_its_budget_and_goes_on_with_a_larger_one(service: Service) -> None:
    client = service.client()
    upload(client, "thrift", rows(40))
    whole = wait_done(client, submit(client, **BODY))
    assert whole["status"] == "succeeded", explain_failure(service, client, whole["id"])
    job_id = submit(client, **BODY, budget={"gpu_hours": whole["actual"]["gpu_hours"] * 0.6})

    def paused() -> Row | None:
        seen = job(client, job_id)
        assert seen["status"] not in ("succeeded", "failed"), seen
        return seen if seen["status"] == "paused" else None

    seen = wait_for(paused, 300)
    assert seen["error"]["code"] == "budget_reached" and seen["status_details"]["reason"].startswith("budget_reached")
    assert client.post(f"/finetune/{job_id}/resume").json()["error"]["code"] == "budget_reached"
    assert "checkpoint" in [event["type"] for event in events(client, job_id)]
    assert client.post(f"/finetune/{job_id}/resume", json={"budget": {"gpu_hours": 50}}).status_code == 200
    assert wait_done(client, job_id)["status"] == "succeeded", explain_failure(service, client, job_id)
    assert [row.loss for row in losses(service, job_id)] == [row.loss for row in losses(service, whole["id"])]
