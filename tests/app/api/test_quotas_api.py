"""Quotas, budgets, priorities, markets and regions, as a tenant meets them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from builders_api import LLAMA_7B, Api
from builders_db import make_base_model, make_job, make_node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, func, update

from app.db.models import Event, Job, Lease, Node, Tenant
from app.db.transitions import Change, transition
from cluster.core.job import JobState as S

MINIMAL = {"base_model": "tiny", "dataset_id": "rows"}


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == code and error["hint"], error
    if status in (409, 429):
        assert answer.headers["x-should-retry"] == "false" and "retry-after" not in answer.headers
    return error


def create(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/finetune", json={**MINIMAL, **fields})
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    return made


def quota(api: Api, **values: Any) -> None:
    with api.database.platform() as session:
        session.execute(update(Tenant).where(Tenant.id == "acme").values(**values))


def move(api: Api, job_id: str, *states: S) -> None:
    with api.database.platform() as session:
        row = session.get_one(Job, job_id, with_for_update=True)
        for state in states:
            assert transition(session, row, Change(state, f"to {state}"))


def used(api: Api, job_id: str, hours: float, price: float = 0.0) -> None:
    """A closed lease of one slot."""
    now = func.now()
    with api.database.platform() as session:
        job = session.get_one(Job, job_id)
        session.add(
            Lease(
                job_id=job_id,
                attempt=1,
                node="n1",
                tenant_id=job.tenant_id,
                slots=[0],
                kind="cpu",
                epoch=1,
                granted_at=now,
                expires_at=now,
                released_at=now,
                held_s=hours * 3600,
                price_per_hour=price,
            )
        )


def test_a_place_in_the_queue_is_needed_again_to_resume_and_to_retry(api: Api, acme: httpx.Client) -> None:
    paused, failed = create(acme)["id"], create(acme)["id"]
    move(api, paused, S.PAUSED)
    move(api, failed, S.FAILED)
    quota(api, max_queued_jobs=1)
    waiting = create(acme)["id"]
    for job, verb in ((paused, "resume"), (failed, "retry")):
        assert "wait already" in refused(acme.post(f"/finetune/{job}/{verb}"), 429, "quota_exceeded")["message"]
    acme.post(f"/finetune/{waiting}/cancel")
    assert acme.post(f"/finetune/{paused}/resume").json()["status"] == "queued"
    refused(acme.post(f"/finetune/{failed}/retry"), 429, "quota_exceeded")
    move(api, paused, S.PREPARING)
    assert acme.post(f"/finetune/{failed}/retry").json()["status"] == "queued"


def test_what_the_scheduler_sent_back_takes_no_place(api: Api, acme: httpx.Client) -> None:
    quota(api, max_queued_jobs=1)
    with api.database.platform() as session:
        for state in (S.SUSPENDED, S.RECOVERING, S.PARKED, S.PAUSED):
            make_job(session, "acme", state=state)
    create(acme)
    assert acme.get("/limits").json()["queued_jobs"] == {"used": 1, "limit": 1}


def test_two_requests_cannot_take_the_last_place(api: Api, acme: httpx.Client) -> None:
    quota(api, max_queued_jobs=3)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: acme.post("/finetune", json=MINIMAL).status_code, range(8)))
    assert sorted(answers) == [202] * 3 + [429] * 5


def test_the_hours_of_a_month_end(api: Api, acme: httpx.Client) -> None:
    done, paused = create(acme)["id"], create(acme)["id"]
    move(api, paused, S.PAUSED)
    used(api, done, 2.0)
    quota(api, gpu_hours_per_month=2.5)
    create(acme)
    quota(api, gpu_hours_per_month=2.0)
    told = refused(acme.post("/finetune", json=MINIMAL), 429, "quota_exceeded")
    assert "2.00 of its 2 GPU-hours" in told["message"]
    refused(acme.post(f"/finetune/{paused}/resume"), 429, "quota_exceeded")
    assert acme.get("/limits").json()["gpu_hours_this_month"] == {"used": 2.0, "limit": 2.0}
    quota(api, gpu_hours_per_month=None)
    create(acme)


def test_another_tenant_s_hours_are_its_own(api: Api, acme: httpx.Client) -> None:
    used(api, create(acme)["id"], 5.0)
    quota(api, gpu_hours_per_month=1.0)
    with api.client("rival") as rival:
        assert rival.get("/limits").json()["gpu_hours_this_month"] == {"used": 0.0, "limit": None}


def test_a_spent_budget_needs_a_larger_one(api: Api, acme: httpx.Client) -> None:
    with api.database.platform() as session:
        session.execute(update(Node).values(price_per_hour=3.0))
    job = create(acme, budget={"gpu_hours": 2, "usd": 5})
    assert job["budget"] == {"gpu_hours": 2.0, "usd": 5.0}
    used(api, job["id"], 2.0, price=3.0)
    move(api, job["id"], S.PREPARING, S.RUNNING, S.PAUSED)
    path = f"/finetune/{job['id']}/resume"
    assert "2 GPU-hours" in refused(acme.post(path), 409, "budget_reached")["message"]
    assert "5 USD" in refused(acme.post(path, json={"budget": {"gpu_hours": 9}}), 409, "budget_reached")["message"]
    assert acme.get(f"/finetune/{job['id']}").json()["budget"]["gpu_hours"] == 2.0, "what is refused changes nothing"
    resumed = acme.post(path, json={"budget": {"gpu_hours": 9, "usd": 50}}).json()
    assert (resumed["status"], resumed["budget"]) == ("queued", {"gpu_hours": 9.0, "usd": 50.0})
    assert resumed["error"] is None
    assert "budget" in [event["type"] for event in acme.get(f"/finetune/{job['id']}/events").json()["data"]]


def test_a_budget_can_be_given_with_the_resume(api: Api, acme: httpx.Client) -> None:
    job = create(acme)["id"]
    refused(acme.post(f"/finetune/{job}/resume", json={"budget": {"gpu_hours": 1}}), 409, "invalid_state")
    assert acme.get(f"/finetune/{job}").json()["budget"] is None
    move(api, job, S.PAUSED)
    assert acme.post(f"/finetune/{job}/resume", json={"budget": {"gpu_hours": 1}}).json()["budget"] == {
        "gpu_hours": 1.0
    }


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"budget": {"gpu_hours": 0}}, "invalid_value"),
        ({"budget": {"gpu_hours": "many"}}, "invalid_value"),
        ({"budget": {}}, "invalid_value"),
        ({"budget": {"hours": 1}}, "unknown_field"),
        ({"budgets": {"usd": 1}}, "unknown_field"),
        ([], "invalid_value"),
    ],
)
def test_a_wrong_resume_is_refused(acme: httpx.Client, body: Any, code: str) -> None:
    job = create(acme)["id"]
    assert acme.post(f"/finetune/{job}/resume", json=body).json()["error"]["code"] == code


def test_a_job_that_has_had_its_run_time_is_not_retried(api: Api, acme: httpx.Client) -> None:
    job = create(acme, resource_config={"max_runtime_hours": 1})["id"]
    move(api, job, S.FAILED)
    with api.database.platform() as session:
        session.execute(update(Job).values(ran_s=3600.0))
    refused(acme.post(f"/finetune/{job}/retry"), 409, "max_runtime_reached")


def test_a_tenant_cannot_ask_for_more_slots_than_it_may_hold(api: Api, acme: httpx.Client) -> None:
    quota(api, max_slots=1)
    told = refused(acme.post("/finetune", json={**MINIMAL, "resource_config": {"num_gpus": 2}}), 429, "quota_exceeded")
    assert told["param"] == "resource_config.num_gpus"
    create(acme)


@pytest.mark.parametrize(("role", "status"), [("member", 403), ("admin", 202)])
def test_to_hurry_needs_a_permission(api: Api, acme: httpx.Client, role: str, status: int) -> None:
    with api.client(role=role) as client:
        for priority in ("urgent", "high"):
            assert client.post("/finetune", json={**MINIMAL, "priority": priority}).status_code == status
            told = client.post("/finetune/estimate", json={**MINIMAL, "priority": priority})
            assert told.status_code == (200 if status == 202 else 403)
        assert client.post("/finetune", json={**MINIMAL, "priority": "low"}).status_code == 202


def test_urgent_beyond_the_allowance_is_told(api: Api, acme: httpx.Client) -> None:
    quota(api, urgent_slots=0)
    job = create(acme, priority="urgent")
    events = acme.get(f"/finetune/{job['id']}/events").json()["data"]
    assert ["counts as high" in event["message"] for event in events if event["type"] == "warning"] == [True]
    quota(api, urgent_slots=1)
    job = create(acme, priority="urgent")
    assert "warning" not in [event["type"] for event in acme.get(f"/finetune/{job['id']}/events").json()["data"]]


@pytest.fixture
def hybrid(api: Api, acme: httpx.Client) -> httpx.Client:
    """A100 on demand in the east, T4 as spot in the west; and the cpu node."""
    with api.database.platform() as session:
        east = {"region": "east", "price_per_hour": 3.0}
        make_node(session, "a", kind="A100-80GB", slots=8, memory_gb=79.0, **east)
        west = {"region": "west", "price_per_hour": 0.4, "market": "spot"}
        make_node(session, "t", kind="T4", slots=8, memory_gb=15.0, **west)
        make_base_model(session, "tiny")
    return acme


@pytest.mark.parametrize(
    ("asked", "kinds"),
    [
        ({}, [["A100-80GB", "T4"]]),
        ({"market": "spot"}, [["T4"]]),
        ({"market": "on_demand"}, [["A100-80GB"]]),
        ({"market": "any"}, [["A100-80GB", "T4"]]),
        ({"region": "west"}, [["T4"]]),
        ({"region": "east", "market": "on_demand"}, [["A100-80GB"]]),
        ({"gpu_type": ["T4", "A100"]}, [["T4"], ["A100-80GB"]]),
        ({"gpu_type": ["A100", "T4"]}, [["A100-80GB"], ["T4"]]),
    ],
)
def test_where_it_may_run(hybrid: httpx.Client, asked: dict[str, Any], kinds: list[list[str]]) -> None:
    shape = hybrid.post("/finetune/estimate", json={**MINIMAL, "resource_config": asked}).json()["shape"]
    assert [one["kinds"] for one in (shape, *shape.get("alternatives", []))] == kinds
    assert shape["park_gb"] > 0


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"region": "mars"}, "region_unavailable"),
        ({"region": "east", "market": "spot"}, "market_unavailable"),
        ({"region": "west", "gpu_type": "A100"}, "gpu_type_unavailable"),
    ],
)
def test_where_nothing_is(hybrid: httpx.Client, asked: dict[str, Any], code: str) -> None:
    told = refused(hybrid.post("/finetune", json={**MINIMAL, "resource_config": asked}), 422, code)
    assert told["param"].startswith("resource_config.")


def test_what_is_too_big_for_one_small_gpu_is_sharded_over_more(api: Api, hybrid: httpx.Client) -> None:
    """Full training of 1.1B with ZeRO: one large slot, or two small ones should they come free earlier."""
    small_llama = {**LLAMA_7B, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    with api.database.platform() as session:
        make_base_model(session, "1b", config=small_llama, parameters=1_100_000_000)
    body = {**MINIMAL, "base_model": "1b", "training_type": "full"}

    def shapes(**asked: Any) -> list[tuple[int, list[str]]]:
        first = hybrid.post("/finetune/estimate", json={**body, "resource_config": asked}).json()["shape"]
        return [(one["slots"], one["kinds"]) for one in (first, *first.get("alternatives", []))]

    assert shapes() == [(1, ["A100-80GB"]), (2, ["T4"])]
    assert shapes(gpu_type=["T4", "A100"]) == [(2, ["T4"]), (1, ["A100-80GB"])]
    assert shapes(mem_limit_gb=12) == [(2, ["A100-80GB", "T4"])]
    quota(api, max_slots=1)
    assert create(hybrid, **{**body, "resource_config": {"gpu_type": ["T4", "A100"]}})["estimate"]["slots"] == 1


def test_a_budget_in_usd_needs_prices(api: Api, hybrid: httpx.Client) -> None:
    on_gpus = {**MINIMAL, "budget": {"usd": 10}}
    assert hybrid.post("/finetune", json=on_gpus).status_code == 202
    on_cpu = {**on_gpus, "resource_config": {"gpu_type": "cpu"}}
    assert refused(hybrid.post("/finetune", json=on_cpu), 422, "price_unknown")["param"] == "budget.usd"


MOST = 3
ACTS = ("create", "pause", "resume", "retry", "cancel", "start", "fail", "suspend")


def act(api: Api, client: httpx.Client, verb: str, job_id: str) -> httpx.Response | None:
    """What the tenant asks for; or what happens to a job, where that can be."""
    then = {"start": S.PREPARING, "fail": S.FAILED, "suspend": S.SUSPENDED}.get(verb)
    if then is None:
        return client.post("/finetune", json=MINIMAL) if verb == "create" else client.post(f"/finetune/{job_id}/{verb}")
    with api.database.platform() as session:
        transition(session, session.get_one(Job, job_id, with_for_update=True), Change(then, verb))
    return None


@settings(
    max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # it clears its jobs itself
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 5)), min_size=5, max_size=25))
@pytest.mark.integration
def test_no_way_leads_past_the_queue_s_quota(api: Api, acme: httpx.Client, acts: list[tuple[str, int]]) -> None:
    quota(api, max_queued_jobs=MOST)
    with api.database.platform() as session:
        for table in (Event, Job):
            session.execute(delete(table))
    jobs = [create(acme)["id"]]
    for verb, number in acts:
        before = acme.get("/limits").json()["queued_jobs"]["used"]
        answer = act(api, acme, verb, jobs[number % len(jobs)])
        after = acme.get("/limits").json()["queued_jobs"]["used"]
        assert after <= MOST
        if answer is not None and answer.status_code == 429:
            assert before == after == MOST and verb in ("create", "resume", "retry")
        elif verb == "create" and answer is not None:
            jobs.append(answer.json()["id"])
