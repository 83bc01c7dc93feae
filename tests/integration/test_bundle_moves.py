"""An environment made by one Heliostat trains on the node of another one, which has no place to fetch a package from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from heliostat_service import SETTINGS, Service, ended, explain_failure, rows, started, submit, upload, wait_done

from runtime_envs.bundles.signing import SigningKey

pytestmark = pytest.mark.integration

SPEC = "name: carried\nbase: host\ndependencies:\n  - pip\n  - pip:\n      - greeter==1.0\n"
NOWHERE = "http://127.0.0.1:9/simple"


@pytest.fixture
def elsewhere(service: Service, llama: Path) -> Iterator[Service]:
    """Its own raylet and data folder; it trusts the first one's bundles."""
    theirs = SigningKey(service.data_dir / "keys" / "bundles.pem").public()
    trusted = json.dumps({"paris": theirs})
    running = started({**SETTINGS, "PIP_INDEX_URL": NOWHERE, "ENVIRONMENTS__TRUSTED_KEYS": trusted})
    try:
        running.add_base_model("tiny", llama)
        yield running
    finally:
        ended(running)


@pytest.fixture
def bundle(service: Service, tmp_path: Path) -> Path:
    made = service.client().post("/environments", json={"spec": SPEC})
    assert made.status_code == 201, made.text
    file = tmp_path / "carried.tar.gz"
    service.heliostat("env", "export", "carried", "--out", str(file))
    return file


def test_a_job_trains_in_an_environment_that_came_as_a_file(bundle: Path, elsewhere: Service) -> None:
    client = elsewhere.client()
    refused = client.post("/environments", json={"spec": SPEC})
    assert refused.status_code >= 400, "it can be fetched here"

    said = elsewhere.heliostat("env", "import", str(bundle)).stdout
    assert "paris" in said
    upload(client, "colours", rows(16))
    hyperparams = {"batch_size": 8, "max_steps": 3}
    job_id = submit(client, base_model="tiny", dataset_id="colours", environment="carried", hyperparams=hyperparams)
    assert wait_done(client, job_id)["status"] == "succeeded", explain_failure(elsewhere, client, job_id)
    assert "greeter 1.0 speaks" in client.get(f"/finetune/{job_id}/logs").text
