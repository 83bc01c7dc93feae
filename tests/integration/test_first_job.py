"""From a POST to a tuned model, through every real process."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest
from heliostat_service import Service, events, explain_failure, rows, submit, upload, wait_done
from kills import losses

pytestmark = pytest.mark.integration


def test_lora_from_post_to_a_folder_that_peft_loads(service: Service, llama: Path, tmp_path: Path) -> None:
    client = service.client()
    upload(client, "first", rows(40))
    upload(client, "first-check", rows(8))
    job_id = submit(
        client,
        base_model="tiny",
        dataset_id="first",
        validation_dataset_id="first-check",
        hyperparams={"learning_rate": 5e-3, "batch_size": 8, "epochs": 4, "load_best_model_at_end": True},
        outputs=["merged", "gguf"],
        output_model="colours",
    )
    seen = wait_done(client, job_id)
    assert seen["status"] == "succeeded", explain_failure(service, client, job_id)
    assert seen["fine_tuned_model"] == "colours@1"
    steps = losses(service, job_id)
    assert [row.step for row in steps] == list(range(1, 21))
    assert steps[-1].loss < steps[0].loss
    told = events(client, job_id)
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    when = [event["data"]["when"] for event in told if event["type"] == "evaluated"]
    assert when[0] == "before" and when[-1] == "after"
    _check_artifact(client, llama, tmp_path)
    _check_forms(client)
    assert client.get(f"/finetune/{job_id}/logs").status_code == 200


def _check_artifact(client: httpx.Client, llama: Path, folder: Path) -> None:
    answer = client.get("/models/colours@1/download")
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(folder, filter="data")
    adapter = next(folder.rglob("adapter_config.json")).parent
    script = (
        "import sys; from peft import PeftModel; from transformers import AutoModelForCausalLM;"
        "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]);"
        "print(sum(p.abs().sum().item() for n, p in m.named_parameters() if 'lora_B' in n))"
    )
    command = [sys.executable, "-c", script, str(llama), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0, "the adapter holds what was learnt"


def _check_forms(client: httpx.Client) -> None:
    def names(query: str) -> set[str]:
        answer = client.get(f"/models/colours@1/download{query}")
        assert answer.status_code == 200, answer.text
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}

    assert {"adapter_model.safetensors", "README.md", "history.jsonl", "curves.png"} <= names("")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names("?output=merged")
    assert names("?output=gguf") == {"model.gguf"}


def test_full_training_continues_nothing_half_and_is_told_as_a_stream(service: Service) -> None:
    client = service.client()
    upload(client, "first", rows(40))
    job_id = submit(
        client,
        base_model="tiny",
        dataset_id="first",
        training_type="full",
        hyperparams={"lr": 1e-3, "batch_size": 8, "max_steps": 5},
    )
    numbers = []
    with client.stream(
        "GET", f"/finetune/{job_id}/events", headers={"accept": "text/event-stream"}, timeout=180
    ) as lines:
        for line in lines.iter_lines():
            if line.startswith("id:"):
                numbers.append(int(line.removeprefix("id:")))
    assert numbers == list(range(1, len(numbers) + 1)), "no event missed, in order, and the stream ends with the job"
    seen = wait_done(client, job_id)
    assert seen["status"] == "succeeded", explain_failure(service, client, job_id)
    answer = client.get("/finetune/nope", headers={"x-request-id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"], "named once, though Serve names requests too"


def test_ray_job_submit_runs_the_command_line_on_the_cluster(service: Service, tmp_path: Path) -> None:
    upload(service.client(), "first", rows(40))
    request = tmp_path / "job.yaml"
    request.write_text(json.dumps({"base_model": "tiny", "dataset_id": "first", "hyperparams": {"max_steps": 2}}))
    environment = service.environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(service.data_dir / "keys" / "ray.token"),
    }
    ray = str(Path(sys.executable).with_name("ray"))
    address = str(service.state()["dashboard_url"])
    command = [ray, "job", "submit", "--address", address, "--", "heliostat", "finetune", "-f", str(request), "--watch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
