"""`queue`, `nodes`, `gpus`, `jobs explain` as people read them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from cli_said import Run
from fake_service import FakeService

from app.cli.line_text import BAR, bar, moments, soon

WHY = [{"code": "slots_busy", "message": "needs 2 slots on one fitting node; at most 1 are free on one"}]


def entry(**more: Any) -> dict[str, Any]:
    """A waiting job, as `/queue` sends it."""
    starts = {"p50": time.time() + 250, "p80": time.time() + 7300}
    row = {
        "position": 1,
        "id": "ftjob-4",
        "tenant": "acme",
        "priority": "urgent",
        "slots": 2,
        "kinds": ["A100", "H100"],
    }
    times = {"queued_at": time.time() - 60, "attained_seconds": 0.0, "start": starts}
    return {**row, **times, "reasons": WHY, "parked": False, **more}


def share(tenant: str | None, slots: int, fair: float | None = None, **more: Any) -> dict[str, Any]:
    row = {"tenant": tenant, "slots": slots, "waiting_slots": 3, "weight": 1.0, "tenants": 2}
    return {**row, **({} if fair is None else {"fair_slots": fair}), **more}


def test_the_queue_says_who_waits_for_what_and_why(cli: Run, service: FakeService) -> None:
    service.objects = {
        "GET /queue": {"data": [entry(), entry(id="ftjob-5", position=2, reasons=[], start=None, kinds=[])]},
        "GET /shares": {"data": [share("acme", 2, 4.0, weight=2.0), share(None, 6)]},
    }
    said = cli("queue").out
    assert all(words in said for words in ("2 × A100 or H100", "in 4 min (P80 in 2.0 h)", WHY[0]["message"]))
    second = next(line for line in said.splitlines() if "ftjob-5" in line)
    assert "2 × any" in second and "next round" in second
    assert "acme (weight 2)" in said and "2 others" in said
    assert cli("queue", "--json").json["shares"][0]["tenant"] == "acme"


@pytest.mark.parametrize(
    ("held", "fair", "longest", "drawn"),
    [
        (4, 4, 8, "█" * (BAR // 2)),
        (2, 4, 8, "█" * (BAR // 4) + "░" * (BAR // 4)),
        (8, 4, 8, "█" * BAR),
        (0, 0, 1, ""),
    ],
)
def test_bars_are_as_long_as_what_they_show(held: float, fair: float, longest: float, drawn: str) -> None:
    assert bar(held, fair, longest).plain == drawn


def test_slots_beyond_the_fair_share_have_another_colour() -> None:
    assert [span.style for span in bar(8, 4, 8).spans] == ["green", "yellow"]


def test_moments_are_distances_and_never_lie_behind() -> None:
    now = time.time()
    assert moments({"p50": now - 5, "p80": None}) == "now (P80 unknown)"
    assert moments({"p50": None, "p80": None}) is None and moments(None) is None
    assert soon(now + 600.5) == "in 10 min"


def test_nodes_say_who_holds_what(cli: Run, service: FakeService) -> None:
    holder = {"id": "ftjob-1", "tenant": "acme", "priority": "low", "state": "running", "slots": [0, 3]}
    more = {"since": time.time() - 300, "turn": 2, "told_to": "park"}
    node = {"id": "n1", "kind": "T4", "slots": 4, "free": 2, "memory_gb": 16.0, "market": "spot", "draining": True}
    service.objects["GET /nodes"] = {"data": [{**node, "seen_at": time.time(), "jobs": [{**holder, **more}]}]}
    said = cli("nodes").out
    assert "T4 (draining)" in said and "spot" in said
    line = next(line for line in said.splitlines() if "ftjob-1" in line)
    assert all(words in line for words in ("0,3", "acme", "low", "running, told to park", "5 min ago"))


def test_gpus_say_how_many_are_in_use_and_wanted(cli: Run, service: FakeService) -> None:
    kind = {"id": "A100", "available": True, "slots": 8, "free": 3, "wanted": 17, "memory_gb": 80.0}
    service.objects["GET /gpu-types"] = {"data": [kind]}
    assert cli("gpus").out.split("\n")[1].split() == ["A100", "8", "5", "17", "80"]


def test_an_explanation_in_sentences(cli: Run, service: FakeService) -> None:
    told = {"id": "ftjob-1", "state": "queued", "reason": "waits for its turn", "since": time.time() - 240}
    places = {"position": 4, "ahead": {"own": 1, "others": 2}, "reasons": WHY, "holds": None}
    finish = {"p50": time.time() + 7250, "p80": time.time() + 10900, "based_on": "its own steps"}
    starts = {"p50": time.time() + 600.5, "p80": time.time() + 1200.5}
    service.objects["GET /finetune/ftjob-1/explain"] = {**told, **places, "start": starts, "finish": finish}
    said = cli("jobs", "explain", "ftjob-1").out
    for words in (
        "queued, waits for its turn, since 4 min",
        "4 in line, behind 1 of your own and 2 of others",
        WHY[0]["message"],
        "in 10 min (P80 in 20 min)",
        "in 2.0 h (P80 in 3.0 h), from its own steps",
    ):
        assert words in said


def test_of_a_running_job_what_it_holds(cli: Run, service: FakeService) -> None:
    holds = {"slots": {"n1": [0, 1]}, "since": time.time() - 600.5, "attained_seconds": 7200.0, "parked": False}
    job = {"id": "ftjob-1", "state": "running", "position": None, "reasons": [], "start": None}
    service.objects["GET /finetune/ftjob-1/explain"] = {**job, "holds": {**holds, "gives_way": True}}
    said = cli("jobs", "explain", "ftjob-1").out
    assert "n1 slot 0, 1, since 10 min, has run 2.0 h in all, told to give way" in said
    assert "place" not in said and "starts" not in said
    parked = {**holds, "parked": True}
    service.objects["GET /finetune/ftjob-1/explain"] = {**job, "state": "parked", "holds": parked}
    assert "memory on n1 (parked)" in cli("jobs", "explain", "ftjob-1").out
