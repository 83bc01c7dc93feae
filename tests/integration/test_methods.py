"""Preference training, a classifier over an encoder, and a job that begins with a checkpoint of another: through every real
process."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import httpx
import pytest
from heliostat_service import Service, events, explain_failure, rows, submit, upload, wait_done

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers" / "child"))
from builders_methods import label_rows, make_tiny_bert, preference_rows

pytestmark = pytest.mark.integration


def succeeded(service: Service, client: httpx.Client, job_id: str) -> None:
    assert wait_done(client, job_id)["status"] == "succeeded", explain_failure(service, client, job_id)


def test_preference_pairs_train_with_dpo(service: Service) -> None:
    client = service.client()
    upload(client, "pairs", preference_rows(24))
    asked = {"lr": 1e-2, "batch_size": 8, "epochs": 4}
    job_id = submit(
        client, base_model="tiny", dataset_id="pairs", method="dpo", validation_split=0.25, hyperparams=asked
    )
    succeeded(service, client, job_id)
    told = events(client, job_id)
    before, after = (event["data"] for event in told if event["type"] == "evaluated")
    assert before["loss"] == pytest.approx(0.693, abs=2e-3) and after["loss"] < before["loss"]
    assert after["reward_accuracy"] > 0.6 and after["rows"] == 6


def test_an_encoder_learns_labels_and_loads_from_its_artifact(service: Service, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    service.add_base_model("bert", make_tiny_bert(tmp_path / "bert"))
    client = service.client()
    upload(client, "labels", label_rows(16))
    job_id = submit(
        client,
        base_model="bert",
        dataset_id="labels",
        validation_dataset_id="labels",
        task="sequence_classification",
        training_type="full",
        hyperparams={"lr": 1e-3, "batch_size": 4, "epochs": 20},
        output_model="countries",
    )
    succeeded(service, client, job_id)
    before, after = (event["data"] for event in events(client, job_id) if event["type"] == "evaluated")
    assert before["accuracy"] < 0.6 and after["accuracy"] == 1.0
    with tarfile.open(fileobj=io.BytesIO(client.get("/models/countries@1/download").content)) as archive:
        archive.extractall(tmp_path, filter="data")
    model = AutoModelForSequenceClassification.from_pretrained(next(tmp_path.glob("countries-1")))
    assert model.config.id2label == {0: "france", 1: "germany", 2: "italy", 3: "spain"}


def test_a_job_begins_with_the_checkpoint_of_another(service: Service) -> None:
    client = service.client()
    upload(client, "colours-again", rows(40))
    asked = {"lr": 5e-3, "batch_size": 8, "epochs": 8, "n_checkpoints": 1}
    first = submit(client, base_model="tiny", dataset_id="colours-again", hyperparams=asked)
    succeeded(service, client, first)
    (checkpoint,) = client.get(f"/finetune/{first}/checkpoints").json()["data"]
    assert checkpoint["step"] == 40, "the last one stays alone"
    second = submit(client, base_model=checkpoint["id"], dataset_id="colours-again", hyperparams={"epochs": 1})
    succeeded(service, client, second)
    losses = [client.get(f"/finetune/{job}/metrics").json()["data"][0]["loss"] for job in (first, second)]
    assert losses[1] < 0.9 * losses[0]
