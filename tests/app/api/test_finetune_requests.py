"""POST /finetune: what is accepted, what is refused and how that is said, and that it happens once."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from builders_api import LLAMA_7B, TINY, Api, jsonl, upload
from builders_db import make_base_model, make_environment, make_job, make_node
from builders_llama import make_hollow_llama
from sqlalchemy import func, select, update

from app.db.models import BaseModel, Checkpoint, Event, Job, Node, Tenant
from trainers.child.convert import convert

AS_DOCUMENTED = b"""{"tenant_id":"user_456","base_model":"llama-7b","dataset_id":"legal_docs_2024",
 "hyperparams":{"lr":3e-5,"batch_size":8,"epochs":3},
 "resource_config":{"gpu_type":"A100","mem_limit_gb":48}}
"""
JSON = {"content-type": "application/json"}
MINIMAL = {"base_model": "tiny", "dataset_id": "rows"}


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, which has all that every error has."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code", "hint", "request_id"} <= error.keys()
    assert error["message"] and error["request_id"] == answer.headers["x-request-id"]
    return error


def test_the_documented_request_is_accepted_byte_for_byte(api: Api, tmp_path: Path) -> None:
    """The model as the importer reads it: a folder of 13.5 GB, of which only the headers are on the disk."""
    model = convert(str(make_hollow_llama(tmp_path / "llama", LLAMA_7B)), tmp_path / "converted")
    assert model.parameters == 6_738_415_616
    with api.database.platform() as session:
        make_node(session, "cpu-1")
        make_base_model(session, "llama-7b", config=model.config, parameters=model.parameters)
    with api.client("user_456") as client:
        assert upload(client, jsonl({"text": "w " * 20_000}), "legal_docs_2024").status_code == 201
        nowhere = refused(client.post("/finetune", content=AS_DOCUMENTED, headers=JSON), 422)
        assert (nowhere["code"], nowhere["param"]) == ("gpu_type_unavailable", "resource_config.gpu_type")
    with api.database.platform() as session:
        make_node(session, "gpu-1", kind="A100-80GB", slots=8, memory_gb=79.0)
    with api.client("user_456") as client:
        answer = client.post("/finetune", content=AS_DOCUMENTED, headers=JSON)
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert answer.headers["location"] == f"/api/v1/finetune/{job['id']}"
        assert client.get(f"/finetune/{job['id']}").json()["status"] == "queued"
    assert job["status"] == "queued" and job["tenant_id"] == "user_456"
    assert job["estimate"]["memory_gb"] < 48 < job["estimate"]["rule_memory_gb"]
    assert job["hyperparams"]["lr"] == 3e-5 and job["hyperparams"]["lora_r"] == 16
    assert (job["training_type"], job["estimate"]["slots"]) == ("lora", 1)


def test_row_lock_and_first_events_are_there_at_once(api: Api, acme: httpx.Client) -> None:
    job = acme.post("/finetune", json=MINIMAL).json()
    with api.database.platform() as session:
        row = session.get_one(Job, job["id"])
        assert (row.state, row.lock["base"]["name"], len(row.fingerprint)) == ("queued", "host", 64)
        types = session.scalars(select(Event.type).where(Event.job_id == row.id).order_by(Event.seq)).all()
    assert types == ["created", "state"]


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"learning_rate": 1e-3}, "lr", 1e-3),
        ({"n_epochs": 2}, "epochs", 2),
        ({"num_train_epochs": 4}, "epochs", 4),
        ({"r": 8}, "lora_r", 8),
        ({"max_length": 128}, "max_seq_len", 128),
        ({"lr": "auto", "epochs": None}, "lr", 2e-4),
    ],
)
def test_synonyms_and_defaults(acme: httpx.Client, given: dict[str, Any], field: str, value: Any) -> None:
    answer = acme.post("/finetune/estimate", json={**MINIMAL, "hyperparams": given})
    assert answer.json()["hyperparams"][field] == value


def test_full_training_has_a_lower_default_rate(acme: httpx.Client) -> None:
    for body in ({"training_type": "full"}, {"method": "full"}):
        estimate = acme.post("/finetune/estimate", json={**MINIMAL, **body}).json()
        assert (estimate["training_type"], estimate["hyperparams"]["lr"]) == ("full", 2e-5)


BAD: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"hyperparams": {"lrr": 1}}, 422, "unknown_field", "hyperparams.lrr"),
    ({"basemodel": "x"}, 422, "unknown_field", "basemodel"),
    ({"resource_config": {"gputype": "A100"}}, 422, "unknown_field", "resource_config.gputype"),
    ({"hyperparams": {"lr": -1}}, 422, "invalid_value", "hyperparams.lr"),
    ({"hyperparams": {"lr": "fast"}}, 422, "invalid_value", "hyperparams.lr"),
    ({"hyperparams": {"epochs": 0}}, 422, "invalid_value", "hyperparams.epochs"),
    ({"hyperparams": {"epochs": 1.5}}, 422, "invalid_value", "hyperparams.epochs"),
    ({"hyperparams": {"epochs": True}}, 422, "invalid_value", "hyperparams.epochs"),
    ({"hyperparams": {"lr": 1e-3, "learning_rate": 1e-4}}, 422, "invalid_value", "hyperparams.learning_rate"),
    ({"hyperparams": {"early_stopping_patience": 2}}, 422, "invalid_value", "hyperparams.early_stopping_patience"),
    ({"hyperparams": {"load_best_model_at_end": True}}, 422, "invalid_value", "hyperparams.load_best_model_at_end"),
    ({"outputs": ["onnx"]}, 422, "invalid_value", "outputs.0"),
    ({"outputs": ["merged"], "training_type": "full"}, 422, "invalid_value", "outputs"),
    ({"hyperparams": {"use_rslora": True}, "training_type": "full"}, 422, "invalid_value", "hyperparams.use_rslora"),
    ({"hyperparams": {"zero_stage": 4}}, 422, "invalid_value", "hyperparams.zero_stage"),
    ({"hyperparams": {"offload": "disk"}}, 422, "invalid_value", "hyperparams.offload"),
    ({"hyperparams": {"offload": "optimizer"}}, 422, "invalid_value", "hyperparams.offload"),
    (
        {"hyperparams": {"offload": "parameters", "zero_stage": 2}},
        422,
        "conflicting_fields",
        "hyperparams.zero_stage",
    ),
    ({"training_type": "qlora", "hyperparams": {"zero_stage": 3}}, 422, "conflicting_fields", "hyperparams.zero_stage"),
    ({"hyperparams": {"beta": 0.1}}, 422, "invalid_value", "hyperparams.beta"),
    ({"method": "dpo"}, 422, "dataset_task_mismatch", "dataset_id"),
    ({"method": "dpo", "task": "sequence_classification"}, 422, "conflicting_fields", "task"),
    ({"method": "custom"}, 422, "missing_field", "entrypoint"),
    ({"entrypoint": "train.py"}, 422, "invalid_value", "entrypoint"),
    ({"code": "mycode"}, 422, "invalid_value", "code"),
    ({"params": {"hidden": 64}}, 422, "invalid_value", "params"),
    ({"method": "qlora"}, 422, "qlora_unsupported", "training_type"),
    ({"method": "lora", "training_type": "full"}, 422, "conflicting_fields", "training_type"),
    ({"training_type": "qlora"}, 422, "qlora_unsupported", "training_type"),
    ({"task": "sequence_classification"}, 422, "dataset_task_mismatch", "dataset_id"),
    ({"validation_split": 1.5}, 422, "invalid_value", "validation_split"),
    ({"validation_split": 0.1, "validation_dataset_id": "rows"}, 422, "conflicting_fields", "validation_split"),
    ({"budget": {"gpu_hours": 0}}, 422, "invalid_value", "budget.gpu_hours"),
    ({"budget": {"gpu_hour": 1}}, 422, "unknown_field", "budget.gpu_hour"),
    ({"budget": {}}, 422, "invalid_value", "budget"),
    ({"budget": {"usd": 5}}, 422, "price_unknown", "budget.usd"),
    ({"resource_config": {"max_runtime_hours": 0}}, 422, "invalid_value", "resource_config.max_runtime_hours"),
    ({"base_model": "nope"}, 404, "base_model_not_found", "base_model"),
    ({"dataset_id": "nope"}, 404, "dataset_not_found", "dataset_id"),
    ({"validation_dataset_id": "nope"}, 404, "dataset_not_found", "validation_dataset_id"),
    ({"environment": "nope"}, 404, "environment_not_found", "environment"),
    ({"tenant_id": "rival"}, 403, "wrong_tenant", "tenant_id"),
    ({"resource_config": {"gpu_type": "B1000"}}, 422, "unknown_gpu_type", "resource_config.gpu_type"),
    ({"resource_config": {"gpu_type": "a100"}}, 422, "gpu_type_unavailable", "resource_config.gpu_type"),
    (
        {"base_model": "big", "resource_config": {"mem_limit_gb": 1}},
        422,
        "memory_limit_too_small",
        "resource_config.mem_limit_gb",
    ),
    ({"base_model": "big"}, 422, "does_not_fit", "resource_config"),
    ({"resource_config": {"num_gpus": 64}, "hyperparams": {"batch_size": 64}}, 422, "does_not_fit", "resource_config"),
    ({"resource_config": {"num_nodes": 2}}, 422, "unsupported_num_nodes", "resource_config.num_nodes"),
    ({"resource_config": {"market": "spot"}}, 422, "market_unavailable", "resource_config.market"),
    ({"resource_config": {"market": "cheap"}}, 422, "invalid_value", "resource_config.market"),
    ({"priority": "now"}, 422, "invalid_value", "priority"),
    ({"resource_config": {"region": "mars"}}, 422, "region_unavailable", "resource_config.region"),
    ({"resource_config": {"num_gpus": 2}, "hyperparams": {"batch_size": 1}}, 422, "invalid_value", None),
    ({"metadata": {"a": "\0"}}, 422, "invalid_value", "metadata.a"),
    ({"output_model": "No Such Name"}, 422, "invalid_value", "output_model"),
]


def test_bad_requests_are_refused_with_the_field_and_a_hint(api: Api, acme: httpx.Client) -> None:
    for change, status, code, param in BAD:
        error = refused(acme.post("/finetune", json={**MINIMAL, **change}), status)
        assert error["code"] == code and error["param"] and error["hint"], (change, error)
        assert param is None or error["param"] == param, (change, error)
    with api.database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_an_unknown_key_says_what_may_have_been_meant(acme: httpx.Client) -> None:
    error = refused(acme.post("/finetune", json={**MINIMAL, "hyperparams": {"learning_rte": 1e-3}}), 422)
    assert "learning_rate" in error["hint"]


def test_refusals_name_what_there_is(acme: httpx.Client) -> None:
    unavailable = refused(acme.post("/finetune", json={**MINIMAL, "resource_config": {"gpu_type": "H100"}}), 422)
    assert "cpu" in unavailable["hint"]
    limited = {**MINIMAL, "base_model": "big", "resource_config": {"mem_limit_gb": 1}}
    tight = refused(acme.post("/finetune", json=limited), 422)
    assert "model estimate" in tight["message"] and "2.5x rule" in tight["message"] and "fits" in tight["hint"]


def test_a_laptop_may_run_it_on_what_it_has(api: Api, acme: httpx.Client) -> None:
    api.settings.gpu_type_fallback = "any"
    job = acme.post("/finetune", json={**MINIMAL, "resource_config": {"gpu_type": "A100"}}).json()
    events = acme.get(f"/finetune/{job['id']}/events").json()["data"]
    assert [event["level"] for event in events if event["type"] == "warning"] == ["warn"]
    api.settings.profile = "production"
    refused(acme.post("/finetune", json={**MINIMAL, "resource_config": {"gpu_type": "A100"}}), 422)


def test_without_a_node_or_a_ready_model_nothing_is_promised(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        session.execute(update(BaseModel).values(status="preparing"))
    assert refused(acme.post("/finetune", json=MINIMAL), 409)["code"] == "base_model_not_ready"
    with api.database.platform() as session:
        session.execute(update(BaseModel).values(status="ready"))
        session.execute(update(Node).values(lost_at=func.now()))
    answer = acme.post("/finetune", json=MINIMAL)
    assert refused(answer, 503)["code"] == "no_nodes"
    assert answer.headers["retry-after"]


def test_quotas_are_hard(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        session.execute(update(Tenant).values(max_queued_jobs=1))
    assert acme.post("/finetune", json=MINIMAL).status_code == 202
    answer = acme.post("/finetune", json=MINIMAL)
    assert refused(answer, 429)["code"] == "quota_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    with api.database.platform() as session:
        session.execute(update(Tenant).values(max_queued_jobs=9, max_slots=1))
    refused(acme.post("/finetune", json={**MINIMAL, "resource_config": {"num_gpus": 2}}), 429)


def estimated(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/finetune/estimate", json={**MINIMAL, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_preference_rows_train_with_dpo(acme: httpx.Client) -> None:
    rows = jsonl(*({"prompt": f"p{number}", "chosen": "a", "rejected": "b"} for number in range(4)))
    assert upload(acme, rows, "pairs").json()["task"] == "preference"
    error = refused(acme.post("/finetune", json={**MINIMAL, "dataset_id": "pairs"}), 422)
    assert error["code"] == "dataset_task_mismatch" and "method dpo" in error["hint"]
    estimate = estimated(acme, dataset_id="pairs", method="dpo")
    assert (estimate["method"], estimate["hyperparams"]["lr"], estimate["hyperparams"]["beta"]) == ("dpo", 5e-6, 0.1)
    full = estimated(acme, dataset_id="pairs", method="dpo", training_type="full", hyperparams={"beta": 0.5})
    assert (full["hyperparams"]["lr"], full["hyperparams"]["beta"]) == (1e-6, 0.5)


def test_labels_train_a_classifier_also_over_an_encoder(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        make_base_model(session, "bert", config={**TINY, "architectures": ["BertForMaskedLM"]}, parameters=130_000)
    rows = jsonl({"text": "dark", "label": "outage"}, {"text": "dear", "label": "billing"})
    assert upload(acme, rows, "labels").json()["task"] == "sequence_classification"
    asked = {"dataset_id": "labels", "task": "sequence_classification"}
    for base in ("tiny", "bert"):
        job = acme.post("/finetune", json={**MINIMAL, **asked, "base_model": base}).json()
        assert (job["task"], job["method"], job["status"]) == ("sequence_classification", "sft", "queued")
    error = refused(acme.post("/finetune", json={**MINIMAL, "base_model": "bert"}), 422)
    assert error["code"] == "base_model_not_causal"


def test_qlora_is_accepted_where_there_is_a_gpu(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        make_node(session, "gpu-1", kind="A100-80GB", slots=1, memory_gb=79.0)
    assert estimated(acme, training_type="qlora")["training_type"] == "qlora"
    asked = {**MINIMAL, "training_type": "qlora", "resource_config": {"gpu_type": "cpu"}}
    assert refused(acme.post("/finetune", json=asked), 422)["code"] == "qlora_unsupported"


def test_what_saves_memory_is_chosen_where_it_must_be_or_as_it_is_asked_for(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        make_node(session, "gpu-1", kind="A100-80GB", slots=4, memory_gb=62.0)
    small = estimated(acme)["hyperparams"]
    assert (small["zero_stage"], small["offload"], small["gradient_checkpointing"]) == (2, "none", False)
    full = estimated(acme, base_model="big", training_type="full", hyperparams={"max_seq_len": 512})
    assert (full["hyperparams"]["zero_stage"], full["estimate"]["slots"], full["estimate"]["zero_stage"]) == (3, 2, 3)
    asked = {"zero_stage": 1, "offload": "optimizer", "gradient_checkpointing": True}
    given = estimated(acme, hyperparams=asked)["hyperparams"]
    assert {name: given[name] for name in asked} == asked


def test_the_estimate_knows_where_it_runs_and_what_it_validates_on(api: Api, acme: httpx.Client) -> None:
    def memory_gb(**body: Any) -> float:
        return float(
            estimated(acme, base_model="big", resource_config={"mem_limit_gb": 9999}, **body)["estimate"]["memory_gb"]
        )

    upload(acme, jsonl({"text": "a " * 2000}, {"text": "b"}), "long")
    with api.database.platform() as session:
        session.execute(update(Node).values(memory_gb=9999.0))
    plain, long = memory_gb(), memory_gb(validation_dataset_id="long")
    assert memory_gb(validation_dataset_id="rows") < long, "longer rows to validate on need more"
    with api.database.platform() as session:
        session.execute(update(Node).values(bf16=True))
    assert memory_gb() < 0.7 * plain


def test_what_shapes_a_run_reaches_its_configuration(acme: httpx.Client) -> None:
    asked = {"early_stopping_patience": 2, "n_checkpoints": 3, "packing": False, "use_liger_kernel": False}
    hyperparams = estimated(acme, validation_split=0.25, hyperparams={**asked, "rslora": True})["hyperparams"]
    assert {name: hyperparams[name] for name in asked} == asked
    assert hyperparams["use_rslora"] is True and hyperparams["validation_split"] == 0.25


def test_forms_that_were_asked_for_reach_the_attempt(api: Api, acme: httpx.Client) -> None:
    job = acme.post("/finetune", json={**MINIMAL, "outputs": ["adapter", "merged", "gguf"]}).json()
    with api.database.platform() as session:
        assert session.get_one(Job, job["id"]).request["outputs"] == ["adapter", "merged", "gguf"]
        lock = {"base": {"name": "cpu", "packages": {}}, "conda": [{"name": "pytorch"}], "pip": []}
        make_environment(session, name="own", lock=lock)
        make_environment(session, name="able", lock={**lock, "pip": [{"name": "gguf"}]}, fingerprint="e" * 64)
    error = refused(acme.post("/finetune", json={**MINIMAL, "outputs": ["gguf"], "environment": "own"}), 422)
    assert (error["code"], error["param"]) == ("output_unsupported", "outputs") and "packages" in error["hint"]
    assert acme.post("/finetune", json={**MINIMAL, "outputs": ["gguf"], "environment": "able"}).status_code == 202
    with api.database.platform() as session:
        session.scalars(select(BaseModel).where(BaseModel.name == "tiny")).one().config = {"model_type": "gpt2"}
    error = refused(acme.post("/finetune", json={**MINIMAL, "outputs": ["gguf"]}), 422)
    assert (error["code"], error["param"]) == ("output_unsupported", "outputs")


def test_training_goes_on_from_a_checkpoint(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        tiny = session.scalars(select(BaseModel.id).where(BaseModel.name == "tiny")).one()
        for number, training_type in enumerate(("lora", "full"), 1):
            job = make_job(session, base_model_id=tiny, training_type=training_type, state="failed", attempt=1)
            session.flush()
            fields = {"job_id": job.id, "tenant_id": "acme", "attempt": 1, "step": 7, "files": {}, "metrics": {}}
            session.add(Checkpoint(id=f"ftckpt_{number}", prefix=f"ck/{number}", **fields))
    job = acme.post("/finetune", json={**MINIMAL, "base_model": "ftckpt_1"}).json()
    assert (job["model"], job["base_model"]) == ("tiny", "ftckpt_1")
    with api.database.platform() as session:
        row = session.get_one(Job, job["id"])
        assert (row.parent_checkpoint_id, row.parent_version_id, row.base_model_id) == ("ftckpt_1", None, tiny)
    error = refused(acme.post("/finetune", json={**MINIMAL, "base_model": "ftckpt_2"}), 422)
    assert (error["code"], error["param"]) == ("unsupported_continuation", "training_type")
    assert estimated(acme, base_model="ftckpt_2", training_type="full")["base_model"] == "tiny"
    with api.client("rival") as rival:
        assert upload(rival).status_code == 201
        error = refused(rival.post("/finetune", json={**MINIMAL, "base_model": "ftckpt_1"}), 404)
        assert (error["code"], error["param"]) == ("checkpoint_not_found", "base_model")


def test_one_row_cannot_be_split(acme: httpx.Client) -> None:
    assert upload(acme, jsonl({"text": "alone"}), "one").status_code == 201
    error = refused(acme.post("/finetune", json={**MINIMAL, "dataset_id": "one", "validation_split": 0.5}), 422)
    assert error["param"] == "validation_split"


def test_a_member_cannot_ask_for_urgent(api: Api, acme: httpx.Client) -> None:
    with api.client(role="member") as member, api.client(role="viewer") as viewer:
        assert member.post("/finetune", json=MINIMAL).status_code == 202
        refused(member.post("/finetune", json={**MINIMAL, "priority": "urgent"}), 403)
        refused(viewer.post("/finetune", json=MINIMAL), 403)
    assert acme.post("/finetune", json={**MINIMAL, "priority": "urgent"}).status_code == 202


def test_an_operator_acts_for_the_tenant_that_it_names(api: Api, acme: httpx.Client) -> None:
    with api.client(None, "operator") as operator:
        job = operator.post("/finetune", json={**MINIMAL, "tenant_id": "acme"}).json()
        assert job["tenant_id"] == "acme"
        assert refused(operator.post("/finetune", json=MINIMAL), 422)["code"] == "tenant_required"
        assert operator.get(f"/finetune/{job['id']}", params={"tenant_id": "acme"}).status_code == 200
    assert acme.get(f"/finetune/{job['id']}").status_code == 200


def test_200_posts_with_20_keys_make_20_jobs(api: Api, acme: httpx.Client) -> None:
    def post(number: int) -> str:
        answer = acme.post("/finetune", json=MINIMAL, headers={"idempotency-key": f"key-{number % 20}"})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    with ThreadPoolExecutor(32) as pool:
        made = list(pool.map(post, range(200)))
    assert len(set(made)) == 20
    with api.database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 20


def test_a_key_belongs_to_one_request(acme: httpx.Client) -> None:
    key = {"idempotency-key": "k"}
    first = acme.post("/finetune", json=MINIMAL, headers=key)
    spelled = json.dumps(dict(reversed(MINIMAL.items())), indent=3)
    again = acme.post("/finetune", content=spelled, headers={**key, "content-type": "application/json"})
    assert again.json() == first.json()
    error = refused(acme.post("/finetune", json={**MINIMAL, "priority": "low"}, headers=key), 422)
    assert error["code"] == "idempotency_key_reused"


def test_a_refused_request_does_not_use_up_its_key(acme: httpx.Client) -> None:
    key = {"idempotency-key": "k"}
    refused(acme.post("/finetune", json={**MINIMAL, "dataset_id": "nope"}, headers=key), 404)
    assert acme.post("/finetune", json=MINIMAL, headers=key).status_code == 202
