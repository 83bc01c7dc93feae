"""Every policy on small clusters: schedules that are possible, in the order that the policy is known for."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.core.job import Node, Priority
from cluster.errors import InvalidRequest, ResourceError
from cluster.simulation.engine import SPOT_GRACE_S, NodeChange, Run
from cluster.simulation.opponents import POLICIES
from cluster.simulation.play import Setting, simulate
from cluster.simulation.trace import TraceJob

SWITCH_S = 30.0
SMALL = Setting(nodes=2, slots_per_node=4, switch_cost_s=SWITCH_S)


def a_job(number: int, submitted_s: float, duration_s: float, slots: int = 1, **more: object) -> TraceJob:
    return TraceJob(number, submitted_s, duration_s, slots, **{"tenant": "acme", **more})  # type: ignore[arg-type]


def a_crowd(seed: int, count: int = 70) -> list[TraceJob]:
    chance = random.Random(seed)
    times = sorted(chance.uniform(0, 12_000) for _ in range(count))
    return [
        a_job(
            number, at, chance.lognormvariate(6, 1.5), chance.choice((1, 1, 1, 2, 4, 6, 8)), tenant=chance.choice("abc")
        )
        for number, at in enumerate(times)
    ]


def schedule(jobs: list[TraceJob], setting: Setting, tmp_path: Path) -> dict[int, list[Run]]:
    log = tmp_path / "log.jsonl"
    simulate(jobs, replace(setting, log=log))
    found: dict[int, list[Run]] = defaultdict(list)
    for line in log.read_text().splitlines():
        run = json.loads(line)
        found[run["job"]].append(Run(run["job"], run["start"], run["end"], run["nodes"]))
    return found


def most_held(runs: dict[int, list[Run]]) -> int:
    """Slots of one node held at a time, at the worst."""
    changes: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for run in (run for mine in runs.values() for run in mine):
        for name, count in run.nodes.items():
            changes[name] += [(run.start_s, 1, count), (run.end_s, 0, -count)]
    worst = 0
    for moves in changes.values():
        held = 0
        for _, _, count in sorted(moves):
            held += count
            worst = max(worst, held)
    return worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_schedule_is_possible(policy: str, seed: int, tmp_path: Path) -> None:
    jobs = a_crowd(seed)
    runs = schedule(jobs, replace(SMALL, policy=policy), tmp_path)
    assert most_held(runs) <= 4
    for job in jobs:
        mine = runs[job.number]
        assert mine[0].start_s >= job.submitted_s
        assert all(one.end_s <= two.start_s for one, two in itertools.pairwise(mine))
        assert all(run.end_s - run.start_s > SWITCH_S + 60 for run in mine[:-1])
        served = sum(run.end_s - run.start_s for run in mine) - SWITCH_S * (len(mine) - 1)
        assert served == pytest.approx(job.duration_s, abs=1e-3)
        for run in mine:
            assert sum(run.nodes.values()) == job.slots
            assert len(run.nodes) == -(-job.slots // 4) and sum(count < 4 for count in run.nodes.values()) <= 1


def test_first_in_first_out_waits_for_the_gang_in_front(tmp_path: Path) -> None:
    jobs = [a_job(0, 0, 100), a_job(1, 1, 50, slots=8), a_job(2, 2, 10)]
    strict = schedule(jobs, replace(SMALL, policy="fifo"), tmp_path)
    skipping = schedule(jobs, replace(SMALL, policy="fifo-skip"), tmp_path)
    assert (strict[1][0].start_s, strict[2][0].start_s) == (100, 150)
    assert (skipping[1][0].start_s, skipping[2][0].start_s) == (100, 2)


def test_slices_take_turns_by_service(tmp_path: Path) -> None:
    jobs = [a_job(0, 0, 1000, slots=8), a_job(1, 10, 1000, slots=8)]
    runs = schedule(jobs, replace(SMALL, policy="slice"), tmp_path)
    assert runs[1][0].start_s == 300 and len(runs[0]) > 1


def test_las_keeps_who_is_in_the_first_queue(tmp_path: Path) -> None:
    """Below one GPU-hour nobody gives way to a later one: first in, first out within a queue."""
    jobs = [a_job(0, 0, 400, slots=8), a_job(1, 10, 400, slots=8)]
    assert [run.start_s for run in schedule(jobs, replace(SMALL, policy="las"), tmp_path)[1]] == [400]


def test_srtf_is_told_the_durations(tmp_path: Path) -> None:
    jobs = [a_job(0, 0, 5000, slots=8), a_job(1, 10, 4000, slots=8), a_job(2, 10, 500, slots=8)]
    runs = schedule(jobs, replace(SMALL, policy="srtf"), tmp_path)
    assert runs[2][0].start_s == 300 and runs[1][0].start_s == 800 and runs[0][-1].end_s == pytest.approx(9530)


def test_heliostat_lets_a_newcomer_in_at_once(tmp_path: Path) -> None:
    jobs = [*(a_job(number, 0, 50_000, slots=4) for number in range(2)), a_job(2, 20_000, 200, slots=4)]
    runs = schedule(jobs, SMALL, tmp_path)
    assert runs[2][0].start_s == 20_000 and runs[2][0].end_s == 20_200


def test_heliostat_sees_priorities(tmp_path: Path) -> None:
    jobs = [a_job(0, 0, 900, slots=8), a_job(1, 1, 900, slots=8), a_job(2, 2, 900, slots=1, priority=Priority.URGENT)]
    runs = schedule(jobs, SMALL, tmp_path)
    assert runs[2][0].start_s < runs[1][0].start_s


@pytest.mark.parametrize("policy", ["heliostat", "slice", "fifo-skip"])
def test_a_node_that_goes_takes_no_work_with_it(policy: str, tmp_path: Path) -> None:
    nodes = [Node(str(number), "V100-16GB", 4, 16.0, market="spot") for number in range(2)]
    changes = [
        *(NodeChange(0.0, node, True) for node in nodes),
        NodeChange(500.0, nodes[0], False),
        NodeChange(5000.0, nodes[0], True),
    ]
    jobs = [a_job(number, 0, 1000, slots=4) for number in range(4)]
    runs = schedule(jobs, replace(SMALL, policy=policy, changes=changes), tmp_path)
    for job in jobs:
        mine = runs[job.number]
        assert sum(run.end_s - run.start_s for run in mine) - SWITCH_S * (len(mine) - 1) == pytest.approx(1000)
        for run in (run for run in mine if "0" in run.nodes):
            assert run.end_s <= 500 + SPOT_GRACE_S or run.start_s >= 5000
            assert not 500 <= run.start_s < 5000
    assert any(len(mine) > 1 for mine in runs.values())


@pytest.mark.parametrize("policy", ["heliostat", "slice", "fifo-skip"])
def test_kinds_are_respected(policy: str, tmp_path: Path) -> None:
    nodes = [Node("0", "A100-80GB", 4, 80.0), Node("1", "T4", 4, 16.0)]
    jobs = [a_job(number, 0, 300, slots=2, kinds=("A100",)) for number in range(4)]
    setting = replace(SMALL, policy=policy, changes=[NodeChange(0.0, node, True) for node in nodes])
    runs = schedule(jobs, setting, tmp_path)
    assert {name for mine in runs.values() for run in mine for name in run.nodes} == {"0"}


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "srtf"])
def test_decisions_know_no_duration_before_its_end(policy: str, tmp_path: Path) -> None:
    """Other durations for the jobs unfinished at T change nothing before T."""
    jobs, at = a_crowd(3), 6000.0
    whole = schedule(jobs, replace(SMALL, policy=policy), tmp_path)
    longer = [
        replace(job, duration_s=3 * job.duration_s + 500) if whole[job.number][-1].end_s > at else job for job in jobs
    ]
    assert longer != jobs
    other = schedule(longer, replace(SMALL, policy=policy, until_s=at), tmp_path)
    assert _before(whole, at) == _before(other, at)


def _before(runs: dict[int, list[Run]], at: float) -> list[object]:
    found = [run for mine in runs.values() for run in mine if run.start_s < at]
    return sorted(
        (run.start_s, run.number, sorted(run.nodes.items()), run.end_s if run.end_s <= at else None) for run in found
    )


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(ResourceError, match="needs 9 GPUs; 2 nodes have 8"):
        simulate([a_job(0, 0, 1, slots=9)], SMALL)


def test_kinds_need_nodes_that_have_one() -> None:
    with pytest.raises(ResourceError, match="asks for T4"):
        simulate([a_job(0, 0, 1, kinds=("T4",))], SMALL)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no policy lottery"):
        simulate([a_job(0, 0, 1)], replace(SMALL, policy="lottery"))


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot be written"):
        simulate([a_job(0, 0, 1)], replace(SMALL, log=tmp_path / "none" / "log.jsonl"))
    assert list(tmp_path.iterdir()) == []
