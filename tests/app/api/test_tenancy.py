"""Every route there is, with another tenant's objects and with tokens that do not hold. A new route cannot be forgotten:
the list is the application's own."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
from builders_api import ROWS, Api, code_archive, make_api, upload, upload_code
from builders_db import make_job
from fastapi.routing import iter_route_contexts
from joserfc import jwt
from joserfc.jwk import OKPKey
from sqlalchemy import Engine, event
from waiting import PATIENCE_S

from app.auth.verify import platform_audience
from app.db.models import Model, ModelVersion
from app.db.session import TENANT_ROLE, Database

OPEN = {"/healthz", "/readyz"}
DOCS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
MINIMAL = {"base_model": "tiny", "dataset_id": "rows"}
BODIES: dict[str, dict[str, Any]] = {
    "POST /finetune": {"json": MINIMAL},
    "POST /finetune/estimate": {"json": MINIMAL},
    "POST /datasets": {"files": {"file": ("x.jsonl", ROWS)}},
    "POST /code": {"files": {"file": ("x.tar.gz", code_archive())}},
    "POST /environments": {"json": {"spec": "name: x\n"}},
    "POST /environments/import": {"files": {"file": ("x.tar.gz", b"x")}},
    "POST /environments/{ref}/update": {"json": {"add": ["six"]}},
    "PUT /models/{ref}/aliases/{alias}": {"json": {"version": 1}},
    "POST /models/{ref}/rollback": {"json": {}},
    "POST /base-models": {"json": {"name": "x", "source": "/x"}},
    "POST /tokens": {"json": {}},
    "PATCH /tenants/{ref}": {"json": {"weight": 2}},
}


def routes(api: Api) -> list[tuple[str, str]]:
    """(method, path below /api/v1 or as it is)."""
    found = [context for context in iter_route_contexts(api.app.routes) if context.path not in DOCS]
    return [(method, one.path.removeprefix("/api/v1")) for one in found for method in sorted(one.methods or ())]


def test_the_application_s_routes_are_all_known(database: Database, tmp_path: Path) -> None:
    """What reads the list must read all of it: the schema is made from the routes too."""
    api = make_api(database, tmp_path)
    schema = {
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in api.app.openapi()["paths"].items()
        for method in methods
    }
    assert set(routes(api)) == schema and len(schema) >= 45


def send(client: httpx.Client, method: str, path: str, filled: str) -> httpx.Response:
    return client.request(method, filled, **BODIES.get(f"{method} {path}", {}))


def objects(api: Api, client: httpx.Client) -> dict[str, str]:
    """Ids of one tenant's objects, by the kind that a path begins with."""
    dataset = upload(client).json()["id"]
    environment = client.post("/environments", json={"spec": "name: mine\n"}).json()["id"]
    job = client.post("/finetune", json=MINIMAL).json()["id"]
    with api.database.platform() as session:
        done = make_job(session, "acme", state="succeeded", output_model="tuned")
        model = Model(id="model-acme", tenant_id="acme", name="tuned", last_version=1)
        session.add(model)
        session.flush()
        version = {"id": "mv-acme", "model_id": model.id, "job_id": done.id, "tenant_id": "acme", "version": 1}
        session.add(ModelVersion(**version, kind="adapter", prefix="p", files={}, metrics={}, lineage={}))
    code = upload_code(client).json()["id"]
    return {"datasets": dataset, "code": code, "environments": environment, "finetune": job, "models": "model-acme"}


def test_another_tenant_s_object_is_missing_on_every_route(api: Api) -> None:
    api.add_cluster()
    with api.client("acme") as acme, api.client("rival") as rival:
        mine = objects(api, acme)
        upload(rival)
        tried = 0
        for method, path in routes(api):
            kind = path.split("/")[1]
            if "{" not in path or kind not in mine:
                continue
            filled = re.sub(r"\{alias\}", "prod", re.sub(r"\{(ref|job_id)\}", mine[kind], path))
            answer = send(rival, method, path, filled)
            assert answer.status_code == 404, (method, path, answer.text)
            assert answer.json()["error"]["code"].endswith("_not_found")
            missing = send(rival, method, path, re.sub(r"\{alias\}", "prod", re.sub(r"\{(ref|job_id)\}", "nope", path)))
            assert missing.json()["error"]["code"] == answer.json()["error"]["code"], "existence must not show"
            tried += 1
        assert tried >= 20
        assert acme.get(f"/finetune/{mine['finetune']}").json()["status"] == "queued"
        for path in ("/finetune", "/models", "/code", "/environments", "/queue"):
            assert rival.get(path).json()["data"] == []


def test_another_tenant_s_objects_cannot_be_referred_to(api: Api) -> None:
    api.add_cluster()
    with api.client("acme") as acme, api.client("rival") as rival:
        mine = objects(api, acme)
        for body in (
            {**MINIMAL, "dataset_id": mine["datasets"]},
            {**MINIMAL, "base_model": "tuned@1"},
            {**MINIMAL, "base_model": "mv-acme"},
        ):
            assert rival.post("/finetune", json=body).status_code == 404
        upload(rival)
        script = {**MINIMAL, "method": "custom", "entrypoint": "train.py"}
        assert acme.post("/finetune/estimate", json={**script, "code": mine["code"]}).status_code == 200
        assert rival.post("/finetune", json={**script, "code": mine["code"]}).status_code == 404
        body = {**MINIMAL, "environment": mine["environments"]}
        assert rival.post("/finetune", json=body).status_code == 404
        answer = acme.get(f"/environments/{mine['environments']}", params={"against": "nope"})
        assert answer.status_code == 404
        token = acme.post("/tokens", json={}).json()["id"]
        assert rival.delete(f"/tokens/{token}").status_code == 404
        assert [one["tenant"] for one in rival.get("/tokens").json()["data"]] == ["rival"]


def test_a_cursor_of_another_tenant_names_nothing(api: Api) -> None:
    api.add_cluster()
    with api.client("acme") as acme, api.client("rival") as rival:
        mine = objects(api, acme)
        for kind, path in (("datasets", "/datasets"), ("finetune", "/finetune"), ("models", "/models")):
            answer = rival.get(path, params={"after": mine[kind]})
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_cursor")


def tokens_that_do_not_hold(api: Api) -> dict[str, str]:
    good = api.token("acme")
    head, body, signature = good.split(".")
    now = int(time.time())
    claims = {"iss": "heliostat", "aud": "heliostat", "sub": "x", "iat": now - 99, "exp": now + 99}
    claims |= {"tenant": "acme", "role": "admin", "scope": "model:read"}
    own = OKPKey.import_key(json.loads(api.settings.issuer_key_file.read_text()))
    foreign = OKPKey.generate_key("Ed25519", {"kid": own.kid})

    def signed(key: Any, **changes: Any) -> str:
        return str(jwt.encode({"alg": "Ed25519", "kid": own.kid}, {**claims, **changes}, key, algorithms=["Ed25519"]))

    return {
        "missing": "",
        "no token": "nonsense",
        "tampered": f"{head}.{body}.{signature[:-6]}AAAAAA",
        "expired": signed(own, iat=now - 9999, exp=now - 999),
        "foreign key": signed(foreign),
        "other issuer": signed(own, iss="elsewhere"),
        "other audience": signed(own, aud="elsewhere"),
        "subject that is no text": signed(own, sub=5),
        "subject with a NUL": signed(own, sub="a\0b"),
        "id that is no text": signed(own, jti=5),
        "id with a NUL": signed(own, jti="a\0b"),
        "platform audience with a tenant": signed(own, aud=platform_audience(api.settings.auth)),
    }


def test_tokens_that_do_not_hold_open_no_route(api: Api) -> None:
    bad = tokens_that_do_not_hold(api)
    with httpx.Client(base_url=f"{api.url}/api/v1", timeout=PATIENCE_S, trust_env=False) as client:
        for method, path in routes(api):
            if path in OPEN:
                continue
            filled = re.sub(r"\{\w+\}", "x", path)
            for reason, token in bad.items():
                headers = {"authorization": f"Bearer {token}"} if token else {}
                body = BODIES.get(f"{method} {path}", {})
                answer = client.request(method, filled, headers=headers, **body)
                assert answer.status_code == 401, (reason, method, path, answer.text)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert not token or token not in answer.text


def test_a_revoked_token_ends_at_once(api: Api) -> None:
    with api.client("acme") as admin, api.client("acme", "member") as member:
        assert member.get("/me").status_code == 200
        listed = {one["role"]: one["id"] for one in admin.get("/tokens").json()["data"]}
        assert admin.delete(f"/tokens/{listed['member']}").status_code == 200
        assert member.get("/me").json()["error"]["code"] == "token_revoked"


def test_a_viewer_changes_nothing(api: Api) -> None:
    api.add_cluster()
    with api.client("acme") as acme, api.client("acme", "viewer") as viewer:
        mine = objects(api, acme)
        for method, path in routes(api):
            if method == "GET" or path == "/healthz":
                continue
            filled = re.sub(r"\{alias\}", "prod", re.sub(r"\{\w+\}", mine.get(path.split("/")[1], "x"), path))
            answer = send(viewer, method, path, filled)
            assert answer.status_code == 403, (method, path, answer.text)


def test_the_platform_reads_no_data_and_no_logs(api: Api) -> None:
    api.add_cluster()
    with api.client("acme") as acme, api.client(None, "operator") as operator, api.client(None, "auditor") as auditor:
        mine = objects(api, acme)
        for client in (operator, auditor):
            for path in (
                f"/datasets/{mine['datasets']}/preview",
                f"/finetune/{mine['finetune']}/logs",
                f"/finetune/{mine['finetune']}/events",
                "/events",
            ):
                assert client.get(path, params={"tenant_id": "acme"}).status_code == 403, path
        assert len(auditor.get("/finetune", params={"tenant_id": "acme"}).json()["data"]) == 2
        assert auditor.post("/finetune", json={**MINIMAL, "tenant_id": "acme"}).status_code == 403
        assert operator.post("/base-models", json={"name": "m", "source": "/m"}).status_code == 202
        assert acme.post("/base-models", json={"name": "m", "source": "/m"}).status_code == 403
        assert len(operator.get("/queue").json()["data"]) == 1


def test_a_scope_can_be_one_object(api: Api) -> None:
    with api.client("acme", scope="dataset:read:rows dataset:write") as narrow:
        assert upload(narrow, name="rows").status_code == 201
        assert upload(narrow, name="other").status_code == 201
        assert narrow.get("/datasets/rows").status_code == 200
        assert narrow.get("/datasets/other").json()["error"]["code"] == "scope_missing"
        assert narrow.get("/datasets").status_code == 403


def test_a_scope_for_one_object_holds_for_its_versions(api: Api) -> None:
    with api.client("acme") as acme, api.client("acme", scope="dataset:read:rows") as narrow:
        upload(acme, name="rows")
        assert narrow.get("/datasets/rows@1").status_code == 200
        assert narrow.get("/datasets/rowsx@1").status_code == 403


def test_a_token_with_a_narrow_scope_makes_no_wider_one(api: Api) -> None:
    """What a token may not do itself it must not do by making another."""
    for tenant, role in (("acme", "admin"), (None, "operator")):
        with api.client(tenant, role) as whole, api.client(tenant, role, scope="model:read") as narrow:
            for ask in ({"json": {}}, {"json": {"scope": "model:read"}}):
                answer = narrow.post("/tokens", **ask)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")
            listed = whole.get("/tokens").json()["data"][0]["id"]
            assert narrow.delete(f"/tokens/{listed}").status_code == 403
            assert whole.post("/tokens", json={}).status_code == 201


def test_an_operator_s_scope_counts_for_base_models_too(api: Api) -> None:
    api.add_cluster()
    with api.client(None, "operator", scope="model:read") as narrow:
        assert narrow.get("/base-models").status_code == 200
        assert narrow.post("/base-models", json={"name": "m", "source": "/m"}).status_code == 403
        assert narrow.delete("/base-models/tiny").status_code == 403


TENANTS_TABLES = (
    "datasets",
    "code",
    "environments",
    "models",
    "model_versions",
    "model_aliases",
    "steps",
    "checkpoints",
    "events",
)


def test_what_tenants_own_is_only_read_under_row_level_security(api: Api) -> None:
    """Every statement of every route: one over a tenant's tables runs as the role that sees this tenant only."""
    api.add_cluster()
    seen: list[tuple[str, str]] = []

    def note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if re.search(rf"\b(FROM|INTO|UPDATE|JOIN) ({'|'.join(TENANTS_TABLES)})\b", statement):
            role = connection.connection.cursor().execute("SELECT current_user").fetchone()[0]
            seen.append((role, statement))

    with api.client("acme") as acme:
        mine = objects(api, acme)
        event.listen(Engine, "before_cursor_execute", note)
        try:
            for method, path in sorted(routes(api), key=lambda one: one[0] == "DELETE"):
                if path != "/events":
                    filled = re.sub(r"\{\w+\}", mine.get(path.split("/")[1], "x"), path)
                    send(acme, method, path, filled)
        finally:
            event.remove(Engine, "before_cursor_execute", note)
    assert len(seen) > 50
    assert {statement for role, statement in seen if role != TENANT_ROLE} == set()


def test_a_tenant_s_explanation_names_no_other_tenant_s_job(api: Api) -> None:
    api.add_cluster()
    with api.database.platform() as session:
        theirs = make_job(
            session, "rival", priority="urgent", shape={"slots": 2, "memory_gb": 1, "kinds": [], "nodes": 1}
        )
        their_id = theirs.id
    with api.client("acme") as acme:
        upload(acme)
        job = acme.post("/finetune", json=MINIMAL).json()["id"]
        told = acme.get(f"/finetune/{job}/explain")
        assert told.json()["position"] == 2 and told.json()["reasons"]
        assert their_id not in told.text + acme.get("/queue").text
        assert acme.get(f"/finetune/{job}").json()["status_details"]["position"] == 2
