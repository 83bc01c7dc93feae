"""Why a job waits, in words and stable codes, and its place in the line. Pure; the same rules as the decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.core.facts import Facts
from cluster.core.job import Job, Node, Priority, Shape
from cluster.core.kinds import matches
from cluster.core.order import Rank
from cluster.core.pools import Option
from cluster.core.rounds import Outcome, Round, turn_of_parked
from cluster.core.slices import Holding
from cluster.core.state import ClusterState


@dataclass(frozen=True)
class Reason:
    code: str
    message: str


@dataclass(frozen=True)
class Explanation:
    """`position`: 1 is the next in line. `reasons`: empty when the job starts with the next round."""

    position: int
    reasons: tuple[Reason, ...]


def explain(state: ClusterState, job_id: str, now: float) -> Explanation | None:
    """None: the job does not wait."""
    found = explain_all(state, [job_id], now)
    return found.get(job_id)


def explain_all(state: ClusterState, job_ids: Iterable[str], now: float) -> dict[str, Explanation]:
    """Of those that wait, by one look along the line."""
    facts = state.facts
    facts.advance(now)
    looks = Round(facts, now)
    looks.decisions()
    parked = {held.job.id: held for held in facts.parked.values()}
    found = {}
    for job_id in job_ids:
        job = facts.get(job_id)
        if job is not None:
            found[job_id] = Explanation(facts.position(job_id), _reasons(facts, job, looks.outcome, now))
        elif job_id in parked:
            held = parked[job_id]
            place = 1 + facts.waiting.ahead_of(turn_of_parked(facts, held))
            found[job_id] = Explanation(place, _parked_reasons(held, looks.outcome))
    return found


def _reasons(facts: Facts, job: Job, outcome: Outcome, now: float) -> tuple[Reason, ...]:
    if job.id in outcome.granted:
        return ()
    hard = [_backoff(job, now), _tenant_limit(facts, job), _never_fits(facts, job)]
    reasons = [reason for reason in hard if reason is not None] or [_busy(facts, job, outcome)]
    soft = _over_allowance(facts, job)
    return (*reasons, soft) if soft else tuple(reasons)


def _parked_reasons(held: Holding, outcome: Outcome) -> tuple[Reason, ...]:
    if held.job.id in outcome.granted:
        return ()
    if held.job.id in outcome.promised:
        return (_making_room(),)
    where = " and ".join(held.placement.nodes)
    return (Reason("others_turn", f"it is others' turn on {where}; its state waits in memory there"),)


def _backoff(job: Job, now: float) -> Reason | None:
    if job.not_before <= now:
        return None
    return Reason("backoff", f"its last attempt failed; it is tried again in {job.not_before - now:.0f} s")


def _tenant_limit(facts: Facts, job: Job) -> Reason | None:
    account, slots = facts.ledger.account(job.tenant), min(shape.slots for shape in job.shapes)
    if account.admits(slots):
        return None
    limit = account.share.max_slots
    return Reason("tenant_limit", f"needs {_slots(slots)}; its tenant holds {account.held} of at most {limit}")


def _over_allowance(facts: Facts, job: Job) -> Reason | None:
    if job.priority != Priority.URGENT or facts.class_of(job) != Rank.URGENT:
        return None
    if facts.ledger.admits_urgent(job.tenant, job.shape.slots):
        return None
    own = facts.ledger.urgent_allowance(facts.ledger.account(job.tenant))
    most = facts.ledger.urgent_capacity()
    return Reason(
        "urgent_allowance",
        f"counts as high: urgent jobs may hold {_slots(own)} of its tenant, {most} of all tenants together",
    )


def _never_fits(facts: Facts, job: Job) -> Reason | None:
    """Why no node, even empty, could take it; None: one could."""
    if facts.pools.options_of(job):
        return None
    nodes = [node for node in facts.pools.nodes.values() if not node.draining]
    if not nodes:
        return Reason("no_nodes", "no node has joined the cluster that takes jobs")
    return _elsewhere(job, nodes) or _too_much(job.shape, nodes)


def _elsewhere(job: Job, nodes: list[Node]) -> Reason | None:
    if job.region and job.region not in {node.region for node in nodes}:
        return Reason("region_unavailable", f"no node is in region {job.region}")
    if job.market and job.market not in {node.market for node in nodes}:
        return Reason("market_unavailable", f"no node is of market {job.market}")
    return None


def _too_much(shape: Shape, nodes: list[Node]) -> Reason:
    kind = [node for node in nodes if not shape.kinds or any(matches(asked, node.kind) for asked in shape.kinds)]
    if not kind:
        there = ", ".join(sorted({node.kind for node in nodes}))
        return Reason("kind_unavailable", f"no node offers {' or '.join(shape.kinds)}; there is {there}")
    large = [node for node in kind if node.memory_gb >= shape.memory_gb]
    if not large:
        most = max(node.memory_gb for node in kind)
        return Reason("memory_too_small", f"needs {shape.memory_gb:g} GiB a slot; the largest has {most:g} GiB")
    most_slots = max(node.slots for node in large)
    where = "one node" if shape.nodes == 1 else f"at most {shape.nodes} like nodes"
    return Reason("gang_too_large", f"needs {_slots(shape.slots)} on {where}; the largest node has {most_slots}")


def _busy(facts: Facts, job: Job, outcome: Outcome) -> Reason:
    if job.id in outcome.promised:
        return _making_room()
    options = facts.pools.options_of(job)
    for shape, pool in options:
        for node, for_job in outcome.kept.items():
            enough = node in pool.nodes and pool.mask(node).bit_count() >= min(shape.slots, pool.size)
            if for_job != job.id and enough:
                return Reason("reserved", f"free slots of node {node} are kept for {for_job}, which has waited long")
    return _slots_busy(job, options)


def _slots_busy(job: Job, options: list[Option]) -> Reason:
    most = max(pool.most() for _, pool in options)
    need = _slots(job.shape.slots)
    return Reason("slots_busy", f"needs {need} on one fitting node; at most {most} are free on one")


def _making_room() -> Reason:
    return Reason("making_room", "others were told to give way for it; it starts when their slots are free")


def _slots(count: int) -> str:
    return f"{count} slot" + ("s" if count != 1 else "")
