"""Plays the tables of this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.core.events import JobGranted, JobQueued, JobReleased, NodeJoined, NodeLost, TenantLimited
from cluster.core.explain import explain
from cluster.core.job import Job, Node, Placement, Priority, Shape
from cluster.core.state import ClusterState

SCENARIOS = sorted(Path(__file__).parent.glob("*.yaml"))
ATTEMPT = 1


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_scenario(file: Path) -> None:
    table = yaml.safe_load(file.read_text())
    state = _begin(table)
    for step in table["steps"]:
        now = float(step.get("at", 0))
        _happen(state, step)
        _round(state, now)
        assert _running(state) == step["running"], f"at {now}: who runs where"
        assert _waiting(state, now) == step["waiting"], f"at {now}: who waits, and why"
        settled = state.snapshot()
        for _ in range(5):
            _round(state, now)
        assert state.snapshot() == settled, f"at {now}: five more rounds changed something"


def test_there_are_scenarios() -> None:
    assert len(SCENARIOS) >= 10


def _begin(table: dict[str, Any]) -> ClusterState:
    state = ClusterState()
    tenants = {job["id"]: job.get("tenant", "acme") for job in table["waiting"]}
    for tenant, more in table.get("tenants", {}).items():
        state.apply(TenantLimited(tenant, more["max_slots"]))
    for job_id, place in table.get("running", {}).items():
        state.apply(JobGranted(job_id, ATTEMPT, tenants.get(job_id, "acme"), _placement(place)))
    _happen(state, {"join": table["nodes"], "come": table["waiting"]})
    return state


def _happen(state: ClusterState, step: dict[str, Any]) -> None:
    for job_id in step.get("end", []):
        state.apply(JobReleased(job_id, ATTEMPT))
    for name in step.get("lose", []):
        state.apply(NodeLost(name))
    for name, offer in step.get("join", {}).items():
        state.apply(NodeJoined(Node(name, **offer)))
    for job in step.get("come", []):
        state.apply(JobQueued(_job(**job)))


def _round(state: ClusterState, now: float) -> None:
    for grant in state.decide(now):
        state.apply(JobGranted(grant.job.id, ATTEMPT, grant.job.tenant, grant.placement))


def _job(id: str, waited: float = 0, priority: str = "normal", **more: Any) -> Job:
    tenant, not_before = more.pop("tenant", "acme"), float(more.pop("not_before", 0))
    shape = Shape(more.pop("slots", 1), more.pop("memory_gb", 1), tuple(more.pop("kinds", ())), more.pop("nodes", 1))
    assert not more, f"unknown columns {sorted(more)}"
    return Job(id, tenant, shape, -float(waited), Priority(priority), not_before=not_before)


def _placement(place: str) -> Placement:
    """`n1[0,2]`"""
    found = re.fullmatch(r"(.+)\[([\d,]+)\]", place)
    assert found, f"not a place: {place!r}"
    return Placement({found[1]: tuple(int(slot) for slot in found[2].split(","))})


def _running(state: ClusterState) -> dict[str, str]:
    return {
        held.job_id: "+".join(f"{node}[{','.join(map(str, slots))}]" for node, slots in held.placement.nodes.items())
        for held in state.snapshot().held.values()
    }


def _waiting(state: ClusterState, now: float) -> dict[str, str]:
    found = {job.id: explain(state, job.id, now) for job in state.snapshot().waiting}
    return {job_id: why.reasons[0].code if why and why.reasons else "next" for job_id, why in found.items()}
