"""/code over HTTP, and requests of method `custom`: what is accepted, what comes back, what the job's attempt is told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from builders_api import ROWS, Api, code_archive, upload, upload_code
from builders_db import make_job, make_node

from app.db.assignments import read_assignment
from app.db.models import Checkpoint, Job, Lease
from app.db.registry import Result, register_version
from cluster.storage.objects import folder_sha256

SCRIPT = {
    "base_model": "tiny",
    "dataset_id": "rows",
    "method": "custom",
    "entrypoint": "train.py --lr 1e-4",
    "code": "mycode",
}


@pytest.fixture
def coder(acme: httpx.Client) -> httpx.Client:
    assert upload_code(acme).status_code == 201
    return acme


def test_an_archive_is_a_version_of_its_name(api: Api) -> None:
    with api.client() as client:
        answer = upload_code(client)
        made = answer.json()
        assert answer.status_code == 201 and answer.headers["location"] == f"/api/v1/code/{made['id']}"
        assert (made["ref"], made["file_count"], made["bytes"]) == ("mycode@1", 1, 15)
        shown = client.get("/code/mycode").json()
        assert shown["sha256"] == folder_sha256(shown["files"]) and list(shown["files"]) == ["train.py"]
        assert upload_code(client).status_code == 200, "the same files"
        other = upload_code(client, code_archive(train="x = 1\n", other="")).json()
        assert (other["ref"], other["file_count"]) == ("mycode@2", 2)
        assert [one["ref"] for one in client.get("/code", params={"name": "mycode"}).json()["data"]] == [
            "mycode@2",
            "mycode@1",
        ]
        assert client.get("/code/mycode@1").json()["sha256"] == made["sha256"]
        keys = api.storage.keys(f"tenants/acme/code/{other['id']}")
        assert [key.rsplit("/", 1)[1] for key in keys] == ["other.py", "train.py"]
        assert client.delete("/code/mycode@2").json()["deleted"]
        assert api.storage.keys(f"tenants/acme/code/{other['id']}") == []
        assert client.get("/code/mycode@2").status_code == 404
        assert upload_code(client, code_archive(train="x = 2\n")).json()["ref"] == "mycode@3"


def test_a_refused_archive_leaves_nothing(api: Api) -> None:
    with api.client() as client:
        answer = upload_code(client, ROWS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "archive_refused")
        unknown = upload_code(client, format="zip").json()["error"]
        assert (unknown["code"], unknown["param"]) == ("unknown_field", "format")
        assert upload_code(client, name="Not A Name").json()["error"]["code"] == "invalid_name"
        assert client.get("/code").json()["data"] == [] and api.keys() == []


def test_a_job_of_a_script(api: Api, coder: httpx.Client) -> None:
    body = {
        **SCRIPT,
        "hyperparams": {"lr": 1e-3},
        "params": {"hidden": [64, 32]},
        "resource_config": {"mem_limit_gb": 3},
    }
    job = coder.post("/finetune", json=body).json()
    assert (job["method"], job["code"], job["entrypoint"]) == ("custom", "mycode@1", "train.py --lr 1e-4")
    assert job["hyperparams"] == {"lr": 1e-3} and job["params"] == {"lr": 1e-3, "hidden": [64, 32]}
    assert (job["estimate"]["memory_gb"], job["estimate"]["decided_by"]) == (3, "mem_limit_gb")
    with api.database.platform() as session:
        row = session.get_one(Job, job["id"])
        lease = {"job_id": row.id, "attempt": 0, "node": "node-cpu", "tenant_id": "acme", "slots": [0], "kind": "cpu"}
        session.add(Lease(**lease, epoch=1, expires_at=row.created_at))
        session.flush()
        script = read_assignment(session, row).script
        assert script is not None and script.entrypoint == ["train.py", "--lr", "1e-4"]
        assert script.params == job["params"]
        assert api.storage.read_bytes(f"{script.prefix}/train.py") == b"print('hello')\n" and list(script.files) == [
            "train.py"
        ]
    used = coder.delete("/code/mycode")
    assert (used.status_code, used.json()["error"]["code"]) == (409, "code_in_use")


def test_a_retry_needs_the_code(api: Api, coder: httpx.Client) -> None:
    job = coder.post("/finetune", json=SCRIPT).json()
    coder.post(f"/finetune/{job['id']}/cancel")
    assert coder.delete("/code/mycode").status_code == 200
    with api.database.platform() as session:
        session.get_one(Job, job["id"]).state = "failed"
    answer = coder.post(f"/finetune/{job['id']}/retry")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "code_deleted")


def test_without_a_limit_a_script_gets_what_the_model_takes_to_answer(coder: httpx.Client) -> None:
    estimate = coder.post("/finetune/estimate", json=SCRIPT).json()
    assert estimate["estimate"]["decided_by"] == "inference" and 0.4 < estimate["estimate"]["memory_gb"] < 1
    assert "steps" not in estimate["estimate"]
    planned = coder.post("/finetune/estimate", json={**SCRIPT, "hyperparams": {"max_steps": 7}}).json()
    assert planned["estimate"]["steps"] == 7


def test_a_module_of_the_environment_needs_no_code(coder: httpx.Client) -> None:
    body = {key: value for key, value in SCRIPT.items() if key != "code"}
    assert coder.post("/finetune/estimate", json={**body, "entrypoint": "-m pkg.train"}).status_code == 200


def test_rows_of_any_kind_and_models_of_any_kind(api: Api, coder: httpx.Client) -> None:
    assert upload(coder, b'{"text":"a","label":"b"}\n{"text":"c","label":"d"}\n', name="labels").status_code == 201
    assert coder.post("/finetune/estimate", json={**SCRIPT, "dataset_id": "labels"}).status_code == 200


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"entrypoint": None}, "missing_field", "entrypoint"),
    ({"entrypoint": ""}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "train.py 'open"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "python train.py"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "/bin/train.py"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "../train.py"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "-m"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "-m ../x"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "-c 1"}, "invalid_entrypoint", "entrypoint"),
    ({"entrypoint": "trian.py"}, "entrypoint_not_found", "entrypoint"),
    ({"code": None}, "missing_field", "code"),
    ({"training_type": "lora"}, "invalid_value", "training_type"),
    ({"task": "sequence_classification"}, "invalid_value", "task"),
    ({"validation_split": 0.5}, "invalid_value", "validation_split"),
    ({"hyperparams": {"lr": 1e-3}, "params": {"lr": 1}}, "conflicting_fields", "params.lr"),
    ({"hyperparams": {"hidden": 1}}, "unknown_field", "hyperparams.hidden"),
    ({"params": {"text": "x" * 20_000}}, "invalid_value", "params"),
    ({"params": {"text": "\0"}}, "invalid_value", ""),
    ({"resource_config": {"num_gpus": 3}}, "does_not_fit", "resource_config"),
    ({"resource_config": {"mem_limit_gb": 9}}, "does_not_fit", "resource_config"),
    ({"resource_config": {"num_nodes": 2}}, "unsupported_num_nodes", "resource_config.num_nodes"),
]


def test_what_a_script_cannot_be_started_with(coder: httpx.Client) -> None:
    for changes, code, param in BAD:
        answer = coder.post("/finetune", json={**SCRIPT, **changes})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"] or "") == (422, code, param), (changes, error)
        assert error["hint"]
    assert coder.get("/finetune").json()["data"] == []


def test_a_file_that_lies_deeper_is_named(acme: httpx.Client) -> None:
    upload_code(acme, code_archive(**{"project/train": ""}))
    hint = acme.post("/finetune", json=SCRIPT).json()["error"]["hint"]
    assert hint == "Did you mean `project/train.py`?"


def test_a_gpu_type_is_asked_for_as_ever(api: Api, coder: httpx.Client) -> None:
    with api.database.platform() as session:
        make_node(session, "gpus", kind="A100-80GB", slots=4, memory_gb=80.0)
    body = {**SCRIPT, "resource_config": {"gpu_type": "A100", "num_gpus": 3, "mem_limit_gb": 40}}
    shape = coder.post("/finetune/estimate", json=body).json()["shape"]
    assert (shape["slots"], shape["kinds"], shape["memory_gb"]) == (3, ["A100-80GB"], 40)


@pytest.mark.parametrize(
    ("file", "kind"), [("model.pt", "files"), ("config.json", "model"), ("adapter_config.json", "adapter")]
)
def test_what_a_script_has_made_can_be_gone_on_from(api: Api, coder: httpx.Client, file: str, kind: str) -> None:
    with api.database.platform() as session:
        done = make_job(session, "acme", method="custom", training_type="full", output_model="made")
        result = Result("prefix", {file: "a" * 64}, {}, {})
        assert register_version(session, done, result) == "made@1"
        done.state = "succeeded"
    assert coder.get("/models/made@1").json()["kind"] == kind
    assert coder.post("/finetune/estimate", json={**SCRIPT, "base_model": "made@1"}).status_code == 200
    trained = coder.post("/finetune/estimate", json={"base_model": "made@1", "dataset_id": "rows"})
    code = trained.json().get("error", {}).get("code")
    assert code == ("unsupported_continuation" if kind == "files" else None)


def test_a_script_s_checkpoint_is_its_own_job_s(api: Api, coder: httpx.Client) -> None:
    with api.database.platform() as session:
        done = make_job(session, "acme", method="sft")
        session.add(
            Checkpoint(
                id="ftckpt_1", job_id=done.id, tenant_id="acme", attempt=1, step=1, prefix="p", files={}, metrics={}
            )
        )
    error = coder.post("/finetune", json={**SCRIPT, "base_model": "ftckpt_1"}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_continuation", "base_model")
