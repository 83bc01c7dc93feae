"""Environments, models, base models, tokens, the cluster, health; and the form that every error has."""

from __future__ import annotations

import hashlib
import io
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from builders_api import Api, make_api, serving
from builders_db import make_job, make_node
from sqlalchemy import select
from waiting import PATIENCE_S

from app.db.embedded import EmbeddedPostgres
from app.db.migrate import migrate
from app.db.models import BaseModel, EnvironmentCheck, Job, Model, ModelVersion
from app.db.session import Database

SPEC = "name: mine\ndependencies:\n  - python\n"


def code(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"] and error["message"] and error["type"]
    return str(error["code"])


def test_environments(api: Api) -> None:
    with api.client() as client:
        answer = client.post("/environments", json={"spec": SPEC}, headers={"idempotency-key": "k"})
        made = answer.json()
        assert answer.status_code == 201 and (made["ref"], made["spec"]) == ("mine@1", SPEC)
        assert client.post("/environments", json={"spec": SPEC}, headers={"idempotency-key": "k"}).json() == made
        assert client.post("/environments", json={"spec": SPEC}).json()["id"] == made["id"]
        changed = client.post("/environments/mine/update", json={"spec": SPEC + "# again\n"}).json()
        assert (changed["ref"], changed["fingerprint"]) == ("mine@2", made["fingerprint"])
        assert client.get("/environments/mine@1", params={"against": "mine"}).json()["diff"]["changed"] == []
        assert [one["ref"] for one in client.get("/environments").json()["data"]] == ["mine@2", "mine@1"]
        assert (
            code(client.post("/environments/mine/update", json={"spec": "name: other\n"})) == "environment_name_differs"
        )
        assert code(client.post("/environments/mine/update", json={})) == "invalid_value"
        old = "name: old\ndependencies:\n  - python=3.9\n"
        refused = client.post("/environments", json={"spec": old})
        assert (refused.status_code, code(refused)) == (422, "environment_unsupported")
        assert client.post("/environments", json={"spec": "["}).status_code == 422
        for check in ("verify", "repair"):  # no node has it
            checked = client.post(f"/environments/mine/{check}").json()
            assert (checked["environment"], checked["ok"], checked["nodes"]) == ("mine@2", True, [])
        with api.database.platform() as session:
            session.add(EnvironmentCheck(fingerprint=made["fingerprint"], node="n1", kind="full", status="ok",
                                         checked_at=datetime.fromtimestamp(1e9, UTC)))  # fmt: skip
        checks = [{"node": "n1", "kind": "full", "status": "ok", "detail": "", "at": 1_000_000_000}]
        assert client.get("/environments/mine").json()["checks"] == checks
        assert client.delete("/environments/mine@1").status_code == 200
        assert client.get("/environments/mine@1").status_code == 404


def test_an_environment_file_can_be_sent_as_it_is(api: Api) -> None:
    with api.client() as client:
        made = client.post("/environments", json={"spec": SPEC}).json()
        for body in (
            {"content": SPEC.encode(), "headers": {"content-type": "application/yaml"}},
            {"files": {"file": ("environment.yml", SPEC.encode())}},
        ):
            answer = client.post("/environments", **body)  # type: ignore[arg-type]
            assert (answer.status_code, answer.json()["id"]) == (201, made["id"])
        wrong = client.post("/environments", content=b"x", headers={"content-type": "image/png"})
        assert (wrong.status_code, code(wrong)) == (415, "unsupported_media_type")
        assert code(client.post("/environments", json={"spce": "x"})) == "unknown_field"
        broken = client.post("/environments", content=b"{", headers={"content-type": "application/json"})
        assert (broken.status_code, code(broken)) == (400, "invalid_json")
        assert code(client.post("/environments", content=b"\xff", headers={"content-type": "text/yaml"})) == "not_utf8"


def test_a_job_keeps_the_environment_that_it_has(api: Api, acme: httpx.Client) -> None:
    acme.post("/environments", json={"spec": SPEC})
    body = {"base_model": "tiny", "dataset_id": "rows", "environment": "mine"}
    job = acme.post("/finetune", json=body).json()
    assert job["environment"] == "mine@1"
    acme.post("/environments/mine/update", json={"spec": SPEC + "# 2\n"})
    assert acme.get(f"/finetune/{job['id']}").json()["environment"] == "mine@1"
    assert code(acme.delete("/environments/mine@1")) == "environment_in_use"


def add_versions(api: Api, count: int = 2, kind: str = "adapter", **job: Any) -> None:
    """Versions of the model `tuned`, with real files in storage."""
    with api.database.platform() as session:
        model = Model(id="model-1", tenant_id="acme", name="tuned", last_version=count)
        session.add(model)
        session.flush()
        base = session.scalar(select(BaseModel.id).where(BaseModel.name == "tiny"))
        for number in range(1, count + 1):
            prefix = f"tenants/acme/models/job{number}/a1"
            contents = {"adapter.bin": b"x" * 3000 * number, "sub/config.json": b"{}"}
            files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
            for name, data in contents.items():
                api.storage.put_bytes(f"{prefix}/{name}", data)
            made = make_job(session, "acme", state="succeeded", base_model_id=base, **job)
            keys = {"id": f"mv-{number}", "model_id": model.id, "tenant_id": "acme", "job_id": made.id}
            more = {"prefix": prefix, "files": files, "metrics": {"loss": 1.0}, "lineage": {"seed": 1}}
            session.add(ModelVersion(**keys, version=number, kind=kind, **more))
            session.flush()


def test_models_versions_and_aliases(api: Api, acme: httpx.Client) -> None:
    add_versions(api, 3)
    assert acme.get("/models/tuned").json()["latest_version"] == 3
    assert {one["version"] for one in acme.get("/models/tuned/versions").json()["data"]} == {1, 2, 3}
    assert code(acme.get("/models/tuned@prod")) == "model_version_not_found"
    for version in (1, 2, 2):
        assert acme.put("/models/tuned/aliases/prod", json={"version": version}).json()["version"] == version
    assert acme.get("/models/tuned@prod").json()["ref"] == "tuned@2"
    assert acme.get("/models/tuned").json()["aliases"] == {"prod": 2}
    assert acme.post("/models/tuned/rollback", json={"alias": "prod"}).json()["version"] == 1
    assert acme.get("/models/tuned@prod").json()["version"] == 1
    assert code(acme.post("/models/tuned/rollback", json={"alias": "beta"})) == "alias_not_found"
    assert code(acme.put("/models/tuned/aliases/7", json={"version": 1})) == "invalid_alias"
    assert code(acme.put("/models/tuned/aliases/prod", json={"version": 9})) == "model_version_not_found"
    assert acme.delete("/models/tuned@3").status_code == 200
    assert acme.get("/models/tuned").json()["latest_version"] == 2
    assert acme.delete("/models/tuned").status_code == 200
    assert acme.get("/models/tuned").status_code == 404
    assert not api.storage.keys("tenants/acme/models")


def test_a_download_is_a_tar_whose_hash_is_told(api: Api, acme: httpx.Client) -> None:
    add_versions(api)
    answer = acme.get("/models/tuned@1/download")
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert files == {"tuned-1/adapter.bin": b"x" * 3000, "tuned-1/sub/config.json": b"{}"}
    assert acme.get("/models/tuned@1/download").content == answer.content


def test_each_form_of_a_version_is_a_download_of_its_own(api: Api, acme: httpx.Client) -> None:
    add_versions(api, 1)
    with api.database.platform() as session:
        row = session.get_one(ModelVersion, "mv-1")
        row.files = {**row.files, "merged/config.json": api.storage.put_bytes(f"{row.prefix}/merged/config.json", b"m")}

    def names(query: str) -> list[str]:
        answer = acme.get(f"/models/tuned/download{query}")
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            return tar.getnames()

    plain = ["tuned-1/adapter.bin", "tuned-1/sub/config.json"]
    assert (names(""), names("?output=adapter")) == (plain, plain)
    assert names("?output=merged") == ["tuned-1-merged/config.json"]
    missing = acme.get("/models/tuned/download?output=gguf")
    assert (missing.status_code, code(missing)) == (404, "output_not_found") and "merged" in missing.text
    assert acme.get("/models/tuned/download?output=onnx").status_code == 422


def test_a_damaged_file_is_not_handed_out(api: Api, acme: httpx.Client) -> None:
    add_versions(api, 1)
    api.storage.put_bytes("tenants/acme/models/job1/a1/adapter.bin", b"y" * 3000)
    answer = acme.get("/models/tuned/download")
    assert (answer.status_code, code(answer)) == (500, "object_damaged")


def test_training_goes_on_from_a_tuned_model(api: Api, acme: httpx.Client) -> None:
    add_versions(api)
    body = {"base_model": "tuned@1", "dataset_id": "rows"}
    job = acme.post("/finetune", json=body).json()
    assert (job["base_model"], job["model"]) == ("tuned@1", "tiny")
    with api.database.platform() as session:
        assert session.get_one(Job, job["id"]).parent_version_id == "mv-1"
    assert code(acme.post("/finetune", json={**body, "training_type": "full"})) == "unsupported_continuation"
    assert code(acme.delete("/models/tuned@1")) == "model_in_use"


def test_base_models_are_the_operators_to_add(api: Api) -> None:
    new = {"name": "llama", "source": "/models/llama"}
    with api.client(None, "operator") as operator, api.client() as acme:
        answer = operator.post("/base-models", json=new)
        assert (answer.status_code, answer.json()["status"]) == (202, "preparing")
        assert operator.post("/base-models", json=new).json() == answer.json()
        assert code(operator.post("/base-models", json={**new, "source": "/other"})) == "base_model_exists"
        assert acme.get("/base-models/llama").json()["name"] == "llama"
        assert code(acme.delete("/base-models/llama")) == "role_forbids"
        assert operator.delete("/base-models/llama").status_code == 200
        assert operator.get("/base-models").json()["data"] == []


def test_a_failed_base_model_can_be_tried_again(api: Api) -> None:
    new = {"name": "llama", "source": "/models/llama"}
    with api.client(None, "operator") as operator:
        operator.post("/base-models", json=new)
        with api.database.platform() as session:
            row = session.scalars(select(BaseModel)).one()
            row.status, row.error = "failed", {"code": "c", "message": "m"}
        again = operator.post("/base-models", json={**new, "source": "/better"}).json()
        assert (again["status"], again["error"], again["source"]) == ("preparing", None, "/better")


def test_tokens(api: Api) -> None:
    with api.client() as acme, api.client(None, "operator") as operator:
        made = acme.post("/tokens", json={"role": "viewer", "expires_in": 60, "subject": "ci"}).json()
        assert (made["tenant"], made["role"], made["subject"]) == ("acme", "viewer", "ci")
        headers = {"authorization": f"Bearer {made['token']}"}
        assert acme.get("/me", headers=headers).json()["token_id"] == made["id"]
        assert made["token"] not in acme.get("/tokens").text
        assert code(acme.post("/tokens", json={"tenant": "rival"})) == "wrong_tenant"
        assert code(acme.post("/tokens", json={"role": "operator"})) == "invalid_role"
        assert operator.post("/tokens", json={"tenant": "newcomer"}).json()["tenant"] == "newcomer"
        assert operator.post("/tokens", json={"role": "auditor"}).json()["tenant"] is None
        assert acme.delete("/tokens/tok-nope").status_code == 404


def test_the_cluster_as_a_tenant_sees_it(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        make_node(session, "gpu", kind="A100-80GB", slots=8, memory_gb=79.0)
    kinds = {one["id"]: one for one in acme.get("/gpu-types").json()["data"]}
    assert (kinds["A100"]["available"], kinds["A100"]["slots"], kinds["H100"]["available"]) == (True, 8, False)
    assert next(iter(kinds.values()))["available"], "what is here comes first"
    assert {one["id"]: one["free"] for one in acme.get("/nodes").json()["data"]} == {"gpu": 8, "node-cpu": 2}
    limits = acme.get("/limits").json()
    assert limits["queued_jobs"] == {"used": 0, "limit": 1000}
    assert acme.get("/me").json()["tenant"] == "acme"


def test_every_error_has_the_same_form(api: Api) -> None:
    with api.client() as client:
        assert code(client.get("/nowhere")) == "route_not_found"
        assert code(client.put("/finetune", json={})) == "method_not_allowed"
        json_headers = {"content-type": "application/json"}
        broken = client.post("/finetune", content="{", headers=json_headers)
        assert (broken.status_code, code(broken)) == (400, "invalid_json")
        for content in ("", "[]", "null", '"x"', '{"base_model": NaN}', b"\xff\xfe", b'{"base_model": "\\ud800"}'):
            answer = client.post("/finetune", content=content, headers=json_headers)
            assert 400 <= answer.status_code < 500 and code(answer), content
        assert code(client.get("/finetune", params={"limit": 0})) == "invalid_value"
        assert client.get("/finetune/%00").status_code == 422
        named = client.get("/me", headers={"x-request-id": "mine-1"})
        assert named.headers["x-request-id"] == "mine-1"
        assert client.get("/me", headers={"x-request-id": "bad id!"}).headers["x-request-id"] != "bad id!"


def test_a_bug_says_only_that_there_is_one(database: Database, tmp_path: Path) -> None:
    api = make_api(database, tmp_path)

    @api.app.get("/bug")
    def bug() -> None:
        raise RuntimeError("secret detail")

    with serving(api), httpx.Client(base_url=api.url, timeout=PATIENCE_S, trust_env=False) as client:
        answer = client.get("/bug")
    assert (answer.status_code, code(answer)) == (500, "internal_error")
    assert "secret" not in answer.text


def test_while_the_database_is_down_the_answer_is_503(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "pg")
    server.start()
    try:
        migrate(server.dsn())
        database = Database(server.dsn())
        with serving(make_api(database, tmp_path)) as api, api.client() as client:
            open_client = httpx.Client(base_url=api.url, timeout=PATIENCE_S, trust_env=False)
            assert open_client.get("/readyz").status_code == 200
            server.stop()
            for answer in (open_client.get("/readyz"), client.get("/finetune"), client.get("/me")):
                assert answer.status_code == 503 and answer.headers["retry-after"] and code(answer)
            assert open_client.get("/healthz").status_code == 200
            server.start()
            assert client.get("/finetune").json()["data"] == []
            open_client.close()
        database.close()
    finally:
        server.stop()
