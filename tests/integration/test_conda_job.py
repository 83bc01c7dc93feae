"""A job in a conda environment over the base `cpu`, from a channel that `heliostat channel build` makes: its own interpreter in its
own prefix. The channel is the benchmark's (`make bench-envs`) where it is there, else a smaller one is made: 240 MB of wheels."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders_wheels import write_wheel
from heliostat_service import (
    SETTINGS,
    Service,
    ended,
    events,
    explain_failure,
    rows,
    started,
    submit,
    upload,
    wait_done,
)

from benchmarks.envs import BASE, WORK, make_channel

pytestmark = pytest.mark.integration
SPEC = """name: own-python
base: cpu
dependencies:
  - python=3.11
  - orjson
  - pip:
    - speaker==1.0
"""
SPEAKER = "import sys\nprint('speaker in', sys.executable, sys.prefix, sys.base_prefix, flush=True)\n"


@pytest.fixture
def channel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (WORK / "channel-of.json").is_file():
        return WORK / "channel"
    try:
        return make_channel(tmp_path_factory.mktemp("channel"), [*BASE, "orjson"])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no index here to take torch's wheel from: pip ended with {error.returncode}")


@pytest.fixture
def conda_service(channel: Path, llama: Path, tmp_path: Path) -> Iterator[Service]:
    write_wheel(tmp_path, "speaker", "1.0", files={"speaker.py": SPEAKER, "speaker.pth": "import speaker\n"})
    channels = json.dumps({"conda-forge": channel.as_uri()})
    places = {"ENVIRONMENTS__CHANNELS": channels, "PIP_FIND_LINKS": json.dumps([str(tmp_path)])}
    running = started({**SETTINGS, **places})
    try:
        running.add_base_model("tiny", llama)
        yield running
    finally:
        ended(running)


def test_it_trains_and_is_checked_and_mended(conda_service: Service) -> None:
    client = conda_service.client()
    client.timeout = 300
    made = client.post("/environments", json={"spec": SPEC})
    assert made.status_code == 201, made.text
    assert (made.json()["base"], made.json()["python"][:4]) == ("cpu", "3.11")
    assert {one["name"] for one in made.json()["packages"]} == {"orjson", "speaker"}
    upload(client, "colours", rows(16))
    job_id = submit(client, base_model="tiny", dataset_id="colours", environment="own-python",
                    hyperparams={"batch_size": 8, "max_steps": 3})  # fmt: skip
    seen = wait_done(client, job_id, timeout_s=900)
    assert seen["status"] == "succeeded", explain_failure(conda_service, client, job_id)
    prefix = conda_service.data_dir / "node" / "envs" / made.json()["fingerprint"] / "prefix"
    said = client.get(f"/finetune/{job_id}/logs").text
    assert f"speaker in {prefix}/bin/python {prefix} {prefix}" in said
    stages = {event["data"]["stage"] for event in events(client, job_id) if event["type"] == "stage"}
    assert {"environment_download", "environment_link", "environment_pip", "environment_byte_code"} <= stages
    _mend(conda_service, prefix)


def _mend(service: Service, prefix: Path) -> None:
    (file,) = prefix.glob("lib/python3.11/site-packages/orjson/__init__.py")
    file.write_bytes(file.read_bytes() + b"\n")
    found = service.heliostat("env", "verify", "own-python", "--json", check=False)
    assert found.returncode == 1
    (node,) = json.loads(found.stdout)["nodes"]
    assert (node["status"], node["damaged"]) == ("damaged", ["lib/python3.11/site-packages/orjson/__init__.py"])
    mended = json.loads(service.heliostat("env", "repair", "own-python", "--json").stdout)
    assert mended["ok"] and mended["nodes"][0]["status"] == "repaired"
    assert json.loads(service.heliostat("env", "verify", "own-python", "--json").stdout)["nodes"][0]["status"] == "ok"
