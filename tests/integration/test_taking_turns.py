"""Six real jobs of three tenants on two slots: the urgent one comes within a quantum and the switch, the long one ends, and
no number of any training is touched by its turns."""

from __future__ import annotations

import json

import pytest
from heliostat_service import Service, explain_failure, job, rows, submit, upload, wait_done, wait_for
from kills import losses
from turn_taking import (
    MIN_RUN_S,
    QUANTUM_S,
    SHORT,
    SWITCH_S,
    URGENT,
    follow_urgent,
    jain,
    run_alone,
    steps_of_long,
    turns_of,
    watched,
    work,
)

pytestmark = pytest.mark.integration


def test_six_jobs_of_three_tenants_take_turns(service: Service) -> None:
    clients = {name: service.tenant(name) for name in ("acme", "globex", "initech")}
    for client in clients.values():
        upload(client, "colours", rows(64))
    alone = {SHORT: run_alone(service, clients["acme"], SHORT)}
    long = steps_of_long(service, alone[SHORT])
    alone[long] = run_alone(service, clients["acme"], long)

    with watched(service, set(clients)) as ledger:
        jobs = [(one, submit(clients[one.tenant], **one.body())) for one in work(long)]
        wait_for(lambda: job(clients["acme"], jobs[0][1])["status"] == "running", 300)
        urgent = submit(clients["initech"], **URGENT.body())
        waits = follow_urgent(service, clients["initech"], urgent)
        jobs.append((URGENT, urgent))
        for one, job_id in jobs:
            seen = wait_done(clients[one.tenant], job_id)
            assert seen["status"] == "succeeded", explain_failure(service, clients[one.tenant], job_id)

    told = {
        "waits": vars(waits) | {"reasons": sorted(waits.reasons)},
        "turns": turns_of(service, [id for _, id in jobs]),
    }
    told |= {"slot_s": dict(ledger.slot_s), "jain": jain(list(ledger.slot_s.values())), "looks": ledger.seen}
    print(json.dumps(told))
    assert ledger.conflicts == [] and ledger.seen > 50
    assert waits.until_granted_s <= max(QUANTUM_S, MIN_RUN_S) + SWITCH_S
    assert waits.reasons <= {"slots_busy", "making_room"}
    assert told["turns"][jobs[0][1]] >= 2, "the long one gave way and went on"
    assert told["jain"] > 0.7
    for one, job_id in jobs:
        steps, expected = losses(service, job_id), losses(service, alone[one.steps])
        assert [row.step for row in steps] == list(range(1, one.steps + 1))
        assert [row.loss for row in steps] == [row.loss for row in expected], f"{one} gave other numbers"
