"""Six real jobs of three tenants on two slots: the urgent one comes within a quantum and the switch, the long one ends, and
no number of any training is touched by its turns."""

from __future__ import annotations

import json

import pytest
from heliostat_service import Service, explain_failure, job, rows, submit, upload, wait_done, wait_for
from kills import losses
from turn_taking import (
    LONG,
    MIN_RUN_S,
    QUANTUM_S,
    SHORT,
    SWITCH_S,
    URGENT,
    WORK,
    follow_urgent,
    jain,
    run_alone,
    turns_of,
    watched,
)

pytestmark = pytest.mark.integration


def test_six_jobs_of_three_tenants_take_turns(service: Service) -> None:
    clients = {name: service.tenant(name) for name in ("acme", "globex", "initech")}
    for client in clients.values():
        upload(client, "colours", rows(64))
    alone = {steps: run_alone(service, clients["acme"], steps) for steps in (SHORT, LONG)}

    with watched(service, set(clients)) as ledger:
        jobs = [(work, submit(clients[work.tenant], **work.body())) for work in WORK]
        wait_for(lambda: sum(job(clients[work.tenant], id)["status"] == "running" for work, id in jobs) >= 2, 300)
        urgent = submit(clients["initech"], **URGENT.body())
        waits = follow_urgent(service, clients["initech"], urgent)
        jobs.append((URGENT, urgent))
        for work, job_id in jobs:
            seen = wait_done(clients[work.tenant], job_id, 400)
            assert seen["status"] == "succeeded", explain_failure(service, clients[work.tenant], job_id)

    told = {
        "waits": vars(waits) | {"reasons": sorted(waits.reasons)},
        "turns": turns_of(service, [id for _, id in jobs]),
    }
    told |= {"slot_s": dict(ledger.slot_s), "jain": jain(list(ledger.slot_s.values())), "looks": ledger.seen}
    print(json.dumps(told))
    assert ledger.conflicts == [] and ledger.seen > 50
    assert waits.until_granted_s <= max(QUANTUM_S, MIN_RUN_S) + SWITCH_S
    assert waits.reasons <= {"slots_busy", "making_room"} and waits.reasons
    assert sum(told["turns"].values()) > len(jobs), "somebody gave way and went on"
    assert told["jain"] > 0.7
    for work, job_id in jobs:
        steps = losses(service, job_id)
        assert [row.step for row in steps] == list(range(1, work.steps + 1))
        assert [row.loss for row in steps] == [row.loss for row in alone[work.steps]], f"{work} gave other numbers"
