"""/tenants: operators set shares and quotas; nobody else sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
from builders_api import Api

from app.db.models import Tenant


@pytest.fixture
def operator(api: Api, acme: httpx.Client) -> Iterator[httpx.Client]:
    with api.client(None, "operator") as client:
        yield client


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_what_is_set_is_shown_and_the_rest_stays(api: Api, operator: httpx.Client) -> None:
    before = operator.get("/tenants/acme").json()
    assert (before["weight"], before["guaranteed_slots"], before["max_queued_jobs"]) == (1.0, 0, 1000)
    change = {"weight": 2.5, "guaranteed_slots": 1, "max_slots": 4, "gpu_hours_per_month": 100}
    after = operator.patch("/tenants/acme", json=change).json()
    assert {key: after[key] for key in change} == change and after["warnings"] == []
    del after["warnings"]
    assert operator.get("/tenants/acme").json() == after
    assert {**before, **change} == after
    assert [one["id"] for one in operator.get("/tenants").json()["data"]] == ["acme"]


def test_null_sets_the_default(api: Api, operator: httpx.Client) -> None:
    limits = {"weight": 3, "guaranteed_slots": 2, "max_slots": 2, "urgent_slots": 0, "max_queued_jobs": 1}
    operator.patch("/tenants/acme", json={**limits, "gpu_hours_month": 5})
    after = operator.patch("/tenants/acme", json=dict.fromkeys([*limits, "gpu_hours_per_month"])).json()
    assert {key: after[key] for key in limits} == {
        "weight": 1.0,
        "guaranteed_slots": 0,
        "max_slots": None,
        "urgent_slots": None,
        "max_queued_jobs": 1000,
    }
    assert after["gpu_hours_per_month"] is None


def test_a_quota_holds_from_the_next_request_on(operator: httpx.Client, acme: httpx.Client) -> None:
    body = {"base_model": "tiny", "dataset_id": "rows"}
    operator.patch("/tenants/acme", json={"max_queued_jobs": 1})
    assert acme.post("/finetune", json=body).status_code == 202
    assert acme.post("/finetune", json=body).status_code == 429
    assert operator.get("/tenants/acme").json()["used"] == {"slots": 0, "queued_jobs": 1, "gpu_hours_this_month": 0.0}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": -1}, "weight"),
        ({"weight": "heavy"}, "weight"),
        ({"guaranteed_slots": 1.5}, "guaranteed_slots"),
        ({"max_slots": -1}, "max_slots"),
        ({"max_queued_jobs": True}, "max_queued_jobs"),
        ({"gpu_hours_per_month": -0.1}, "gpu_hours_per_month"),
        ({"wait": 1}, "wait"),
        ({"max_slots": 2, "guaranteed_slots": 3}, "guaranteed_slots"),
        ({"max_queued": 1, "max_queued_jobs": 2}, "max_queued_jobs"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    operator: httpx.Client, change: dict[str, Any], param: str
) -> None:
    before = operator.get("/tenants/acme").json()
    answer = operator.patch("/tenants/acme", json=change)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert operator.get("/tenants/acme").json() == before


def test_a_tenant_that_never_was_is_missing(operator: httpx.Client) -> None:
    for answer in (operator.get("/tenants/nobody"), operator.patch("/tenants/nobody", json={"weight": 2})):
        assert (answer.status_code, code(answer)) == (404, "tenant_not_found")


def test_tenants_know_nothing_of_each_other(api: Api, operator: httpx.Client) -> None:
    for role in ("viewer", "member", "admin"):
        with api.client(role=role) as client:
            for path in ("/tenants", "/tenants/acme", "/tenants/rival"):
                assert client.get(path).status_code == 403
            assert client.patch("/tenants/acme", json={"weight": 9}).status_code == 403
    with api.client(None, "auditor") as auditor:
        assert auditor.get("/tenants/acme").status_code == 200
        assert auditor.patch("/tenants/acme", json={"weight": 9}).status_code == 403
    with api.client(None, "operator", scope="model:read") as narrow:
        assert code(narrow.patch("/tenants/acme", json={"weight": 9})) == "scope_missing"
    assert operator.get("/tenants/acme").json()["weight"] == 1.0


def test_promising_more_than_there_is_warns(operator: httpx.Client) -> None:
    told = operator.patch("/tenants/acme", json={"guaranteed_slots": 3}).json()["warnings"]
    assert told == ["3 slots are guaranteed in all, the nodes that are here have 2"]


def test_the_scheduler_hears_of_a_change(api: Api, operator: httpx.Client) -> None:
    with psycopg.connect(api.database.dsn, autocommit=True) as listening:
        listening.execute("LISTEN heliostat")
        operator.patch("/tenants/acme", json={"max_queued_jobs": 5})
        operator.patch("/tenants/acme", json={"weight": 2})
        assert [told.payload for told in listening.notifies(timeout=60, stop_after=1)] == ["*"]
        assert list(listening.notifies(timeout=0.2)) == []
    with api.database.platform() as session:
        assert session.get_one(Tenant, "acme").weight == 2.0
