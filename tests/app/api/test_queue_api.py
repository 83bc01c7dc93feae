"""What is told of the line: reasons, places, moments, shares; to whom."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from builders_api import Api
from builders_db import grant, make_job, make_node
from sqlalchemy import delete, update

from app.db.models import Job, Lease, LeaseSlot, Step, Tenant
from app.db.scheduler_store import SqlSchedulerStore
from cluster.core.job import Placement

HOUR = 3600
WORK = {"tokens": 1000, "rows": 20, "steps": 10}


@pytest.fixture
def store(api: Api) -> Iterator[SqlSchedulerStore]:
    with api.database.platform() as session:
        make_node(session, "n1", kind="cpu", slots=2, memory_gb=8.0)
    store = SqlSchedulerStore(api.database)
    yield store
    store.close()


def queued(api: Api, tenant: str = "acme", **fields: Any) -> str:
    with api.database.platform() as session:
        return make_job(session, tenant, **{"estimate": WORK, **fields}).id


def ended(api: Api, tenant: str, run_s: float, train_s: float = 0.0, **fields: Any) -> None:
    actual = {"train_seconds": train_s, "tokens": 1000}
    more = {"attained_s": run_s, "actual": actual, "finished_at": datetime.now(UTC), **fields}
    queued(api, tenant, state="succeeded", **more)


def running(api: Api, store: SqlSchedulerStore, tenant: str, *slots: int, ran_s: float = 0.0, steps: int = 0) -> str:
    shape = {"slots": len(slots), "memory_gb": 1.0, "kinds": [], "nodes": 1}
    job_id = queued(api, tenant, shape=shape)
    assert grant(store, store.take_epoch(), job_id, Placement({"n1": slots})) == 1
    since = datetime.now(UTC) - timedelta(seconds=ran_s)
    with api.database.platform() as session:
        session.execute(update(Job).where(Job.id == job_id).values(state="running", state_since=since))
        session.execute(update(Lease).where(Lease.job_id == job_id).values(held_since=since, granted_at=since))
        for step in range(1, steps + 1):
            numbers = {"epoch": 1.0, "loss": 1.0, "lr": 1e-4, "grad_norm": 1.0, "tokens": 10, "seconds": 60.0}
            session.add(Step(job_id=job_id, step=step, tenant_id=tenant, attempt=1, **numbers))
    return job_id


def told(client: httpx.Client, job_id: str) -> Any:
    answer = client.get(f"/finetune/{job_id}/explain")
    assert answer.status_code == 200, answer.text
    return answer.json()


def from_now(moment: int) -> float:
    return moment - datetime.now(UTC).timestamp()


def test_of_the_first_job_nothing_is_known_but_its_start(api: Api, store: SqlSchedulerStore) -> None:
    job_id = queued(api)
    with api.client() as acme:
        one = told(acme, job_id)
        assert (one["position"], one["ahead"], one["reasons"]) == (1, {"own": 0, "others": 0}, [])
        assert abs(from_now(one["start"]["p50"])) < 60
        assert one["finish"] == {"p50": None, "p80": None, "based_on": None}
        job = acme.get(f"/finetune/{job_id}").json()
        assert abs(from_now(job["estimated_start"])) < 60 and job["estimated_finish"] is None


def test_the_tenant_s_own_jobs_tell_how_long_one_takes(api: Api, store: SqlSchedulerStore) -> None:
    for _ in range(10):
        ended(api, "acme", 2 * HOUR)
        ended(api, "rival", 50 * HOUR)
    mine, new = queued(api), queued(api, "newcomer")
    with api.client() as acme:
        finish = told(acme, mine)["finish"]
        assert finish["based_on"] == "what earlier jobs of the tenant took"
        assert from_now(finish["p50"]) == pytest.approx(2 * HOUR, rel=0.3)
        assert finish["p80"] >= finish["p50"]
        assert acme.get(f"/finetune/{mine}").json()["estimated_finish"] == pytest.approx(finish["p50"], abs=1200)
    with api.client("newcomer") as newcomer:
        assert told(newcomer, new)["finish"]["p50"] is None, "what others' jobs took is not told"


def test_its_work_and_the_measured_speed_tell_more(api: Api, store: SqlSchedulerStore) -> None:
    for _ in range(5):
        ended(api, "acme", 1100.0, 1000.0)
    job_id = queued(api, estimate={"tokens": 20_000, "rows": 400, "steps": 200})
    with api.client() as acme:
        finish = told(acme, job_id)["finish"]
        assert finish["based_on"] == "its work and the speed measured for this model"
        assert from_now(finish["p50"]) == pytest.approx(20_100, rel=0.15)


def test_a_running_job_is_foretold_from_its_own_steps(api: Api, store: SqlSchedulerStore) -> None:
    job_id = running(api, store, "acme", 0, ran_s=240, steps=4)
    with api.client() as acme:
        one = told(acme, job_id)
        assert (one["position"], one["start"], one["ahead"]) == (None, None, None)
        assert one["finish"]["based_on"] == "its own steps"
        assert from_now(one["finish"]["p50"]) == pytest.approx(360, abs=30)
        assert from_now(one["finish"]["p80"]) == pytest.approx(390, abs=40)
        assert one["holds"]["slots"] == {"n1": [0]} and one["holds"]["attained_seconds"] >= 240
        job = acme.get(f"/finetune/{job_id}").json()
        assert from_now(job["estimated_finish"]) == pytest.approx(360, abs=30) and job["estimated_start"] is None


def test_who_waits_behind_it_starts_when_it_ends(api: Api, store: SqlSchedulerStore) -> None:
    running(api, store, "rival", 0, 1, ran_s=30, steps=9)
    job_id = queued(api)
    with api.client() as acme:
        one = told(acme, job_id)
        assert [reason["code"] for reason in one["reasons"]] == ["slots_busy"]
        assert from_now(one["start"]["p80"]) == pytest.approx(66, abs=30)
        entry = acme.get("/queue").json()["data"][0]
        assert (entry["id"], entry["position"], entry["reasons"]) == (job_id, 1, one["reasons"])
        assert entry["start"]["p50"] == pytest.approx(one["start"]["p50"], abs=30)


def test_jobs_ahead_are_counted_not_named(api: Api, store: SqlSchedulerStore) -> None:
    running(api, store, "rival", 0, 1)
    theirs = [queued(api, "rival", priority="high") for _ in range(3)]
    job_id = queued(api, priority="low")
    with api.client() as acme, api.client(None, "operator") as operator:
        one = told(acme, job_id)
        assert (one["position"], one["ahead"]) == (4, {"own": 0, "others": 3})
        texts = [acme.get(path).text for path in ("/queue", "/nodes", "/shares", "/gpu-types", f"/finetune/{job_id}")]
        assert not any(word in text for text in [*texts, str(one)] for word in ("rival", *theirs))
        assert [entry["tenant"] for entry in operator.get("/queue").json()["data"]] == ["rival"] * 3 + ["acme"]


def test_shares_stand_beside_what_is_held_and_wanted(api: Api, store: SqlSchedulerStore) -> None:
    running(api, store, "rival", 0, 1)
    queued(api)
    with api.client() as acme, api.client(None, "operator") as operator:
        own, others = acme.get("/shares").json()["data"]
        assert (own["tenant"], own["slots"], own["waiting_slots"], own["fair_slots"]) == ("acme", 0, 1, 1.0)
        assert others == {
            "tenant": None,
            "object": "share",
            "tenants": 1,
            "slots": 2,
            "waiting_slots": 0,
            "waiting_jobs": 0,
        }
        rows = operator.get("/shares").json()["data"]
        assert [(row["tenant"], row["slots"], row["fair_slots"]) for row in rows] == [
            ("acme", 0, 1.0),
            ("rival", 2, 1.0),
        ]
        assert operator.get("/shares", params={"tenant_id": "acme"}).json()["data"][0]["tenant"] == "acme"


def test_nodes_tell_who_holds_what(api: Api, store: SqlSchedulerStore) -> None:
    mine, theirs = running(api, store, "acme", 0), running(api, store, "rival", 1)
    with api.client() as acme, api.client(None, "operator") as operator:
        node = acme.get("/nodes").json()["data"][0]
        assert (node["slots"], node["free"], node["market"], node["draining"]) == (2, 0, "on_demand", False)
        assert [(job["id"], job["slots"], job["state"]) for job in node["jobs"]] == [(mine, [0], "running")]
        seen = operator.get("/nodes").json()["data"][0]["jobs"]
        assert {job["id"]: job["tenant"] for job in seen} == {mine: "acme", theirs: "rival"}


def test_a_parked_job_waits_for_its_turn(api: Api, store: SqlSchedulerStore) -> None:
    job_id = running(api, store, "acme", 0)
    with api.database.platform() as session:
        now = datetime.now(UTC)
        session.execute(update(Job).where(Job.id == job_id).values(state="parked", reason="another tenant's turn"))
        session.execute(update(Lease).where(Lease.job_id == job_id).values(parked_at=now, held_since=None))
        session.execute(delete(LeaseSlot).where(LeaseSlot.job_id == job_id))
    running(api, store, "rival", 0, 1, ran_s=30, steps=5)
    with api.client() as acme:
        one = told(acme, job_id)
        assert one["position"] == 1 and one["holds"]["parked"]
        assert [reason["code"] for reason in one["reasons"]] == ["others_turn"]
        entry = acme.get("/queue").json()["data"][0]
        assert (entry["id"], entry["parked"]) == (job_id, True)
        details = acme.get(f"/finetune/{job_id}").json()["status_details"]
        assert details["reason"].startswith("another tenant's turn; its next turn comes in about ")


def test_a_tenant_without_gpu_hours_is_told_so(api: Api, store: SqlSchedulerStore) -> None:
    job_id = queued(api)
    with api.database.platform() as session:
        session.execute(update(Tenant).where(Tenant.id == "acme").values(gpu_hours_per_month=0))
    with api.client() as acme:
        one = told(acme, job_id)
        assert [reason["code"] for reason in one["reasons"]] == ["quota_exceeded"]
        assert one["start"] == {"p50": None, "p80": None}


def test_kinds_tell_how_much_is_wanted_of_them(api: Api, store: SqlSchedulerStore) -> None:
    queued(api, "rival", shape={"slots": 3, "memory_gb": 1.0, "kinds": ["A100"], "nodes": 1})
    with api.client() as acme:
        kinds = {kind["id"]: kind for kind in acme.get("/gpu-types").json()["data"]}
        assert (kinds["A100"]["wanted"], kinds["A100-80GB"]["wanted"], kinds["cpu"]["wanted"]) == (3, 3, 0)


def test_what_has_ended_has_no_estimate(api: Api, store: SqlSchedulerStore) -> None:
    ended(api, "acme", 100.0)
    with api.client() as acme:
        job = acme.get("/finetune").json()["data"][0]
        assert (job["estimated_start"], job["estimated_finish"]) == (None, None)


def test_no_job_is_foretold_to_run_longer_than_it_may(api: Api, store: SqlSchedulerStore) -> None:
    for _ in range(5):
        ended(api, "acme", 20.0 * HOUR)
    job_id = queued(api, max_runtime_s=HOUR)
    with api.client() as acme:
        assert from_now(told(acme, job_id)["finish"]["p80"]) <= HOUR + 60
