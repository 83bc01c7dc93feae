"""The example of a tenant's own training through every real process: parked for an urgent job, killed, resumed, downloaded;
with the losses of a run that nobody disturbed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import httpx
import psutil
import pytest
from builders_api import code_archive, upload_code
from heliostat_service import (
    Row,
    Service,
    events,
    explain_failure,
    job,
    submit,
    upload,
    wait_done,
    wait_for,
)
from kills import losses, reached, starts

from trainers.protocol import MARK_VARIABLE

pytestmark = pytest.mark.integration
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom" / "train.py"
STEPS = 60
SLOW = """
import runpy, time
from heliostat import job
between = job.between
def slowly(save):
    time.sleep(0.2)
    between(save)
job.between = slowly
runpy.run_path("train.py", run_name="__main__")
"""
LABELS = [{"text": f"{word} number {n}", "label": word} for n in range(6) for word in ("card", "loan", "phone")]
URGENT = "import os, pathlib\npathlib.Path(os.environ['HELIOSTAT_OUTPUT'], 'done').write_text('x')\n"


def body(entrypoint: str, slots: int, **more: object) -> Row:
    resources = {"gpu_type": "cpu", "num_gpus": slots}
    request = {"base_model": "tiny", "dataset_id": "queues", "method": "custom", "code": "classifier"}
    return {**request, "entrypoint": entrypoint, "resource_config": resources, **more}


def test_a_script_is_parked_killed_and_resumed(service: Service, tmp_path: Path) -> None:
    client, rival = service.client(), service.tenant("globex")
    for one in (client, rival):
        upload(one, "queues", LABELS)
    project = tmp_path / "classifier"
    project.mkdir()
    shutil.copy(EXAMPLE, project)
    (project / "slow.py").write_text(SLOW)
    service.heliostat("code", "upload", str(project))
    assert upload_code(rival, code_archive(quick=URGENT), "classifier").status_code == 201

    params = {"steps": STEPS}
    alone = submit(client, **body("train.py", 1, params=params))
    succeeded(service, client, alone)
    disturbed = submit(client, **body("slow.py", 2, params=params, output_model="mine"))
    wait_for(reached(service, disturbed, 3), 300)
    urgent = submit(rival, **body("quick.py", 1, priority="urgent"))
    wait_for(lambda: job(client, disturbed)["status_details"]["state"] == "parked", 300, every_s=0.05)
    succeeded(service, rival, urgent)
    parked_at = losses(service, disturbed)[-1].step
    wait_for(reached(service, disturbed, parked_at + 3), 300)
    os.kill(script_of(disturbed), signal.SIGKILL)
    succeeded(service, client, disturbed)

    expected, found = losses(service, alone), losses(service, disturbed)
    assert [row.step for row in found] == list(range(1, STEPS + 1))
    assert [row.loss for row in found] == [row.loss for row in expected]
    assert found[-1].loss < found[0].loss and found[-1].attempt == 2
    first, second = starts(client, disturbed)
    assert first == 0 and second > 0, "it went on from its checkpoint"
    check_artifact(client)
    seen = job(client, disturbed)
    assert (seen["code"], seen["entrypoint"], seen["params"]) == ("classifier@1", "slow.py", params)
    log = client.get(f"/finetune/{disturbed}/logs").text
    assert f"[rank 0] 18 rows, 3 labels: done after {STEPS} steps" in log
    named = [one["message"] for one in events(client, disturbed) if one["type"] == "state"]
    assert any(message.startswith("parked") for message in named), named


def succeeded(service: Service, client: httpx.Client, job_id: str) -> None:
    assert wait_done(client, job_id, 400)["status"] == "succeeded", explain_failure(service, client, job_id)


def script_of(job_id: str) -> int:
    """A process of the tenant's script, rank 1 if it can be had."""
    mark = f"{MARK_VARIABLE}={job_id}/".encode()
    found = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "slow.py" in (process.info["cmdline"] or []) and mark in Path(f"/proc/{process.pid}/environ").read_bytes()
    ]
    return max(found)


def check_artifact(client: httpx.Client) -> None:
    version = client.get("/models/mine@1").json()
    assert version["kind"] == "files" and set(version["files"]) == {"labels.json", "model.pt"}
    assert version["lineage"]["entrypoint"] == ["slow.py"] and 0 < version["metrics"]["train_loss"] < 1
    with tarfile.open(fileobj=io.BytesIO(client.get("/models/mine@1/download").content)) as archive:
        labels = archive.extractfile("mine-1/labels.json")
        assert labels is not None and json.load(labels) == ["card", "loan", "phone"]
