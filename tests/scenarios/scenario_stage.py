"""Plays a table under a virtual clock: what happens, what the state machine decides, and when that is carried out."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

from scenario_table import Arrival, Table, arrival, node, place_of

from cluster.core.events import (
    Decision,
    Event,
    Grant,
    How,
    JobGranted,
    JobParked,
    JobQueued,
    JobReleased,
    JobRemoved,
    JobYielding,
    NodeJoined,
    NodeLost,
    Resume,
    TenantSet,
    Yield,
)
from cluster.core.explain import explain_all
from cluster.core.job import TenantShare
from cluster.core.slices import Attempt, Holding
from cluster.core.state import ClusterState

MOST_ROUNDS = 50
SHOWN = 60


class Stage:
    """`forgetful`: it is killed before each moment and comes back with what the rows say, no more."""

    def __init__(self, table: Table, forgetful: bool = False) -> None:
        self.state = ClusterState(table.policy)
        self.now = 0.0
        self.timeline: list[str] = []
        self.started: dict[str, float] = {}
        self.turns: Counter[str] = Counter()
        self._table = table
        self._forgetful = forgetful
        self._needs: dict[str, float | None] = {}
        self._streams = list(table.streams)
        self._leaves_at: dict[Attempt, float] = {}
        self._served: defaultdict[str, float] = defaultdict(float)

    def begin(self) -> None:
        table = self._table
        for name, share in table.tenants.items():
            self._apply(TenantSet(TenantShare(name, **share)))
        for offered in table.nodes:
            self._apply(NodeJoined(offered))
        for held, needs in table.running:
            self._needs[held.job.id] = needs
            self._apply(JobGranted(held.job, held.attempt, held.placement, held.since))
        for came in table.waiting:
            self._come(came)
        if table.steps[0].get("at", 0) > 0:
            self.rounds()

    # Time ---------------------------------------------------------------------------------------------------------

    def play(self, step: dict[str, Any]) -> None:
        """Up to the step's time, then what happens at it."""
        until = float(step.get("at", self.now))
        assert until >= self.now, f"steps go forward: {until} after {self.now}"
        while (moment := self._next_moment()) is not None and moment < until:
            self._moment(moment)
        self._moment(until, step)

    def _next_moment(self) -> float | None:
        """When something happens by itself, or the scheduler has asked to be called again."""
        moments = [end for held in self._runners() if (end := self._end_of(held)) is not None]
        moments += [*self._leaves_at.values(), *(at for at, _ in self._streams[:1])]
        look = self.state.next_look(self.now)
        return min([*moments, *([] if look is None else [look])], default=None)

    def _moment(self, now: float, step: dict[str, Any] | None = None) -> None:
        self.now = now
        if self._forgetful:
            self.state = ClusterState.rebuilt(self.state.snapshot(), self.state.policy)
        self._by_itself()
        self._happen(step or {})
        self.rounds()

    def _by_itself(self) -> None:
        for held in self._runners():
            end = self._end_of(held)
            if end is not None and end <= self.now:
                self._release(held)
        for key in [key for key, at in self._leaves_at.items() if at <= self.now]:
            self._give_way(key)
        while self._streams and self._streams[0][0] <= self.now:
            self._come(self._streams.pop(0)[1])

    def _end_of(self, held: Holding) -> float | None:
        needs = self._needs.get(held.job.id)
        return None if needs is None else held.since + needs - held.job.attained_s

    def _runners(self) -> list[Holding]:
        return [held for held in self.state.facts.held.values() if not held.parked]

    # What happens -------------------------------------------------------------------------------------------------

    def _happen(self, step: dict[str, Any]) -> None:
        for job_id in step.get("end", []):
            self._release(self._held(job_id))
        for job_id in step.get("leave", []):
            self._suspend(self._held(job_id))
        for job_id in step.get("park", []):
            self._park(self._held(job_id))
        for job_id in [*step.get("pause", []), *step.get("cancel", [])]:
            self._withdraw(job_id)
        for job_id, backoff_s in step.get("fail", {}).items():
            self._suspend(self._held(job_id), not_before=self.now + backoff_s)
        self._outside(step)
        for row in step.get("come", []):
            self._come(arrival(now=self.now, **row))

    def _outside(self, step: dict[str, Any]) -> None:
        for name in step.get("lose", []):
            self._apply(NodeLost(name))
        for name, offer in step.get("join", {}).items():
            known = self.state.facts.pools.nodes.get(name)
            self._apply(NodeJoined(node(name, offer) if known is None else replace(known, **offer)))
        for name, share in step.get("set", {}).items():
            self._apply(TenantSet(TenantShare(name, **share)))

    def _come(self, came: Arrival) -> None:
        self._needs[came.job.id] = came.needs
        self._apply(JobQueued(came.job))

    def _held(self, job_id: str) -> Holding:
        found = [held for held in self.state.facts.held.values() if held.job.id == job_id]
        assert found, f"{self.now:g} s: {job_id} holds nothing\n{self.story()}"
        return found[0]

    def _withdraw(self, job_id: str) -> None:
        if self.state.facts.get(job_id) is None:
            self._release(self._held(job_id))
        else:
            self._apply(JobRemoved(job_id))

    def _give_way(self, key: Attempt) -> None:
        held = self.state.facts.held[key]
        self._park(held) if held.yielding == How.PARK else self._suspend(held)

    def _park(self, held: Holding) -> None:
        self._turn_ends(held)
        self._apply(JobParked(*held.key, self.now))

    def _suspend(self, held: Holding, not_before: float = 0.0) -> None:
        attained_s = held.attained_s(self.now)
        self._release(held)
        job = replace(held.job, attempt=held.attempt, queued_at=self.now, attained_s=attained_s, not_before=not_before)
        self._apply(JobQueued(job))

    def _release(self, held: Holding) -> None:
        self._turn_ends(held)
        self._apply(JobReleased(*held.key))

    def _turn_ends(self, held: Holding) -> None:
        self._leaves_at.pop(held.key, None)
        self._served[held.job.id] = held.attained_s(self.now)

    # Decisions ----------------------------------------------------------------------------------------------------

    def rounds(self) -> None:
        """Until there is nothing more to decide at this moment."""
        for _ in range(MOST_ROUNDS):
            decisions = self.state.decide(self.now)
            if not decisions:
                return
            for decision in decisions:
                self._carry_out(decision)
        raise AssertionError(f"{self.now:g} s: it never settles\n{self.story()}")

    def _carry_out(self, decision: Decision) -> None:
        match decision:
            case Grant(job, placement, _):
                self._starts(JobGranted(job, job.attempt + 1, placement, self.now))
            case Resume(job_id, attempt, placement):
                self._starts(JobGranted(self.state.facts.held[job_id, attempt].job, attempt, placement, self.now))
            case Yield(job_id, attempt, how, _):
                self._told((job_id, attempt), how)

    def _starts(self, granted: JobGranted) -> None:
        job_id = granted.job.id
        self._leaves_at.pop((job_id, granted.attempt), None)
        self.started.setdefault(job_id, self.now)
        self.turns[job_id] += 1
        self._apply(granted)

    def _told(self, key: Attempt, how: How) -> None:
        self._apply(JobYielding(*key, how))
        after = self._table.gives_way_after
        if after == 0:
            self._give_way(key)
        elif after is not None:
            self._leaves_at[key] = self.now + after

    def _apply(self, event: Event) -> None:
        self.timeline.append(f"{self.now:8g} s  {_words(event)}")
        self.state.apply(event)

    # What came of it ----------------------------------------------------------------------------------------------

    def story(self) -> str:
        return "\n".join(["What happened (the last of it):", *self.timeline[-SHOWN:]])

    def comes_of_it(self) -> dict[str, Any]:
        held, now = self.state.facts.held.values(), self.now
        holding: Counter[str] = Counter()
        for one in self._runners():
            holding[one.job.tenant] += one.placement.slots
        return {
            "running": {one.job.id: place_of(one.placement) for one in held if not one.parked},
            "told": {one.job.id: str(one.yielding) for one in held if one.yielding},
            "parked": {one.job.id: "+".join(one.placement.nodes) for one in held if one.parked},
            "waiting": self._reasons(),
            "holding": dict(holding),
            "started": dict(self.started),
            "turns": dict(self.turns),
            "served": {**self._served, **{one.job.id: one.attained_s(now) for one in held}},
        }

    def _reasons(self) -> dict[str, str]:
        ids = [job.id for job in self.state.snapshot().waiting]
        ids += [held.job.id for held in self.state.facts.parked.values()]
        found = explain_all(self.state, ids, self.now)
        return {job_id: ", ".join(reason.code for reason in why.reasons) or "next" for job_id, why in found.items()}


def _words(event: Event) -> str:
    match event:
        case JobGranted(job, attempt, placement, _):
            return f"{job.id} has {place_of(placement)} (attempt {attempt})"
        case JobQueued(job):
            return f"{job.id} waits ({job.tenant}, {job.priority}, {job.shape.slots} slots, ran {job.attained_s:g} s)"
        case JobYielding(job_id, _, how):
            return f"{job_id} is told to {how}"
        case _:
            return repr(event)
