"""`tenant`, `limits`, and the budget of `jobs resume` and `finetune`."""

from __future__ import annotations

from typing import Any

import pytest
from cli_said import Run
from fake_service import FakeService, job

ACME: dict[str, Any] = {
    "id": "acme",
    "object": "tenant",
    "created_at": 1,
    "weight": 2.0,
    "guaranteed_slots": 1,
    "max_slots": 4,
    "urgent_slots": None,
    "max_queued_jobs": 9,
    "gpu_hours_per_month": None,
    "used": {"slots": 3, "queued_jobs": 7, "gpu_hours_this_month": 1.25},
}


def test_tenants_are_listed_with_what_they_use(cli: Run, service: FakeService) -> None:
    service.objects = {"GET /tenants": {"data": [ACME], "has_more": False}, "GET /tenants/acme": ACME}
    said = cli("tenants", "list").out
    assert "3 of 4" in said and "7 of 9" in said and "1.25" in said and "usual" in said
    assert cli("tenant", "show", "acme", "--json").json == ACME
    assert "guaranteed slots" in cli("tenant", "show", "acme").out


def test_only_what_is_named_is_sent(cli: Run, service: FakeService) -> None:
    service.objects = {"PATCH /tenants/acme": {**ACME, "warnings": ["too much is promised"]}}
    options = ("--weight", "2.5", "--max-slots", "4", "--gpu-hours-month", "none", "--urgent-slots", "0")
    said = cli("tenant", "set", "acme", *options)
    assert said.code == 0
    assert service.bodies == [{"weight": 2.5, "max_slots": 4, "gpu_hours_per_month": None, "urgent_slots": 0}]
    assert "too much is promised" in said.err


@pytest.mark.parametrize("options", [(), ("--weight", "heavy"), ("--max-slots", "1.5")])
def test_wrong_use_is_told_before_anything_is_sent(cli: Run, service: FakeService, options: tuple[str, ...]) -> None:
    assert cli("tenant", "set", "acme", *options).code == 2
    assert service.bodies == []


def test_limits(cli: Run, service: FakeService) -> None:
    slots = {"used": 1, "limit": None, "guaranteed": 2}
    hours = {"used": 1.5, "limit": 10.0}
    service.objects = {
        "GET /limits": {
            "object": "limits",
            "slots": slots,
            "gpu_hours_this_month": hours,
            "urgent_slots": {"limit": None},
        }
    }
    said = cli("limits").out
    assert "1, 2 guaranteed" in said and "1.5 of 10" in said and "usual" in said


def test_a_budget_is_raised_with_the_resume(cli: Run, service: FakeService) -> None:
    service.objects = {"POST /finetune/ftjob-1/resume": job("queued")}
    assert cli("jobs", "resume", "ftjob-1", "--gpu-hours", "5").code == 0
    assert cli("jobs", "resume", "ftjob-1").code == 0
    assert service.bodies == [{"budget": {"gpu_hours": 5.0}}, {}]


def test_a_budget_and_a_region_are_sent(cli: Run, service: FakeService) -> None:
    wanted = ("--budget-gpu-hours", "2", "--budget-usd", "3.5", "--region", "east", "--market", "spot")
    assert cli("finetune", "--base-model", "m", "--dataset", "d", *wanted).code == 0
    assert service.bodies[0]["budget"] == {"gpu_hours": 2.0, "usd": 3.5}
    assert service.bodies[0]["resource_config"] == {"market": "spot", "region": "east"}


def test_a_job_that_used_its_budget_says_so(cli: Run, service: FakeService) -> None:
    error = {"code": "budget_reached", "message": "the job has used its budget of 2 GPU-hours", "hint": "Resume it."}
    service.jobs["ftjob-1"] = job("paused", error=error, budget={"gpu_hours": 2.0})
    said = cli("jobs", "show", "ftjob-1").out
    assert error["message"] in said and "Resume it." in said and "gpu_hours=2" in said
