"""The scheduler: rows are the wish, agents say what is, one round closes the difference. It keeps nothing that a crash
could lose. Without Ray; `cluster.client` makes it an actor."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from cluster.asking import Asking, Inline, Pending
from cluster.core.events import Decision, Event, Grant, Resume, Yield
from cluster.core.explain import explain_all
from cluster.core.state import ClusterState, Snapshot
from cluster.errors import Unavailable
from cluster.facts import Facts
from cluster.hints import Hints
from cluster.inbox import Inbox
from cluster.ports import Attempt, Nodes, SchedulerParts
from cluster.prestage import Prestage
from cluster.reconcile import Reconciler
from cluster.watch import Unwatched, Watch

log = logging.getLogger(__name__)

MIN_ROUND_S = 0.01
"""A round's own writes wake it again; this gathers a burst of changes into one round."""

MIN_LOOK_S = 0.2
"""So long at least between two looks that only time called for."""

MAX_BACKOFF_S = 10.0

COUNT_S = 10.0
"""How often all jobs are counted for operators."""

EXPLAINED = 50
"""So many of the waiting jobs, from the first in line, are explained in `state`."""


class Scheduler:
    """`open` takes the epoch, `run` works until `stop` or until another scheduler has taken over (raises `Fenced`).
    `pool`: in which agents and drivers are asked; None: in this thread. `watch`: told what operators want to see."""

    def __init__(
        self,
        wiring: Callable[[], SchedulerParts],
        nodes: Nodes,
        clock: Callable[[], float] = time.monotonic,
        pool: Executor | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._wiring = wiring
        self._nodes = nodes
        self._clock = clock
        self._pool = pool or Inline()
        self._watch = watch or Unwatched()
        self._counted_at = -COUNT_S
        self._stopped = threading.Event()
        self._inbox = Inbox()
        self._seeing = threading.Lock()  # `state` is called from other threads
        self._epoch = 0
        self._rounds = 0
        self._problem: str | None = None
        self._poll_at = 0.0
        self._read_at = 0.0
        self._wait_for_poll = False
        self._away = True  # the database, or this scheduler, was not there

    def open(self) -> None:
        """Raises `Unavailable`."""
        self._parts = self._wiring()
        settings = self._parts.settings
        self._asking = Asking(self._pool, self._inbox.wake, self._clock, settings.poll_s)
        self._facts = Facts()
        self._state = ClusterState(settings.policy)
        self._reconciler = Reconciler(self._parts, self._nodes, self._facts, self._asking, self._clock)
        self._hints = Hints(self._parts, self._nodes, self._asking)
        self._prestage = Prestage(self._parts, self._nodes, self._asking, self._clock)
        self._away = True
        self._poll_at = 0.0
        self._epoch = self._parts.store.take_epoch()
        log.info("scheduler epoch %d", self._epoch)

    # The loop -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        listening = threading.Thread(target=self._listen, name="changes", daemon=True)
        pause_s = MIN_ROUND_S
        while not self._stopped.wait(pause_s):
            try:
                if not self._epoch:
                    self.open()
                if not listening.is_alive() and not self._stopped.is_set():
                    listening.start()
                self._round_of_the_loop()
            except Unavailable as error:
                pause_s = self._lose_database(error, pause_s)
            else:
                self._problem = None
                pause_s = MIN_ROUND_S

    def _round_of_the_loop(self) -> None:
        changed = self.round(self._inbox.take())
        if not changed or self._wait_for_poll:
            self._inbox.wait(self._quiet_s())

    def _quiet_s(self) -> float:
        """Until somebody must be asked, or time alone changes what is to be done."""
        until_poll = self._poll_at - self._clock()
        look = None if self._wait_for_poll else self._state.next_look(self._facts.now)
        if look is None:
            return until_poll
        return min(until_poll, max(MIN_LOOK_S, look - self._facts.now - (self._clock() - self._read_at)))

    def _lose_database(self, error: Unavailable, pause_s: float) -> float:
        self._problem = error.message
        self._inbox.put(None)
        self._away = True
        pause_s = min(MAX_BACKOFF_S, max(0.5, pause_s * 2))
        log.warning("%s; trying again in %.1f s", error.message, pause_s)
        return pause_s

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                self._inbox.put(self._parts.store.wait_for_change(self._parts.settings.poll_s))
            except Unavailable:  # the loop meets the same, and says so
                self._inbox.put(None)
                self._stopped.wait(1.0)

    def stop(self) -> None:
        self._stopped.set()
        self._inbox.wake()

    # A round --------------------------------------------------------------------------------------------------------

    def round(self, ids: Collection[str] | None = None) -> bool:
        """One look, at these jobs or at all, and what follows from it; whether a row changed, so that another look is due
        at once. Safe to be cut off anywhere: the next round finds the same difference. Raises `Unavailable`, `Fenced`."""
        poll = ids is None or self._clock() >= self._poll_at
        self._look(ids, poll)
        self._ask_nodes(poll)
        self._reconciler.look_at_drivers(poll)
        self._reconciler.round(self._epoch)
        changed = set(self._reconciler.changed)
        with self._seeing:
            decisions = self._state.decide(self._facts.now)
        changed |= self._carry_out(decisions)
        if poll:
            self._hints.tell(self._state.facts, self._facts.active(), changed)
            self._prestage.tell(self._state.facts.pools.nodes.values())
        self._rounds += 1
        self._count()
        self._inbox.remember(changed)
        return bool(changed)

    def _look(self, ids: Collection[str] | None, poll: bool) -> None:
        """A poll reads, beside what changed, the rows whose clocks drivers renew without telling."""
        wanted = None if ids is None else frozenset(ids) | (self._facts.active_ids() if poll else frozenset())
        rows = self._parts.store.rows(wanted, shares=poll)
        self._read_at = self._clock()
        if poll:
            self._poll_at = self._read_at + min(self._parts.settings.poll_s, self._parts.settings.driver_gone_s)
        self._learn(self._facts.take(rows, wanted))
        self._reconciler.notice_sleep()
        if self._away:
            self._away = False
            self._reconciler.judge_later()

    def _ask_nodes(self, poll: bool) -> None:
        if not poll and not self._asking.is_open("nodes"):
            return
        reports = self._asking.ask("nodes", self._nodes.reports)
        if isinstance(reports, Pending):
            return
        self._parts.store.report_nodes(self._epoch, reports)
        self._learn(self._facts.see(reports))
        self._reconciler.end_strays(reports)

    def _learn(self, events: Iterable[Event]) -> None:
        with self._seeing:
            for event in events:
                self._state.apply(event)

    def _carry_out(self, decisions: Sequence[Decision]) -> set[str]:
        """Orders and turns first: they free slots or take what is free already. The jobs whose rows are to be read again."""
        yields = [one for one in decisions if isinstance(one, Yield)]
        resumes = [one for one in decisions if isinstance(one, Resume)]
        grants = [one for one in decisions if isinstance(one, Grant)]
        told = [*self._order(yields), *self._resume(resumes)]
        self._tell_of_turns([*yields, *resumes], told)
        for key in told:
            self._parts.launcher.nudge(*key)  # only to be faster: drivers look anyway
        done = len(told) + self._grant(grants)
        if done < len(decisions):  # cancelled meanwhile, or the rows know better: only a whole look says which
            self._inbox.remember(None)
        self._wait_for_poll = bool(decisions) and not done
        turns: list[Yield | Resume] = [*yields, *resumes]
        return {one.job.id for one in grants} | {one.job_id for one in turns}

    def _order(self, yields: Sequence[Yield]) -> Collection[Attempt]:
        return self._parts.store.order(self._epoch, yields) if yields else ()

    def _resume(self, resumes: Sequence[Resume]) -> Collection[Attempt]:
        return self._parts.store.resume(self._epoch, resumes) if resumes else ()

    def _grant(self, grants: Sequence[Grant]) -> int:
        if not grants:
            return 0
        granted = self._parts.store.grant(self._epoch, grants, self._parts.settings.lease_ttl_s)
        self._reconciler.granted(granted.items())
        for grant in grants:
            if grant.job.id in granted:
                self._watch.waited(grant.job.tenant, max(0.0, self._facts.now - grant.job.queued_at))
        return len(granted)

    def _tell_of_turns(self, turns: Iterable[Yield | Resume], told: Collection[Attempt]) -> None:
        held = self._state.facts.held
        for turn in turns:
            key = turn.job_id, turn.attempt
            if key in told and key in held:
                self._watch.switched(held[key].job.tenant, turn.how if isinstance(turn, Yield) else "resume")

    def _count(self) -> None:
        if self._clock() < self._counted_at + COUNT_S:
            return
        self._counted_at = self._clock()
        with self._seeing:
            facts = self._state.facts
            counts = Counter((job.tenant, "queued") for job in facts.unordered())
            counts.update((one.job.tenant, "parked" if one.parked else "running") for one in facts.held.values())
        self._watch.jobs(counts)

    # For operators --------------------------------------------------------------------------------------------------

    def ping(self) -> int:
        """The epoch; 0 until the database was reached."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """What it sees, as plain data."""
        if not self._epoch:
            return {"epoch": 0, "problem": self._problem}
        with self._seeing:
            snapshot, now = self._state.snapshot(), self._facts.now
            waiting = explain_all(self._state, [job.id for job in snapshot.waiting[:EXPLAINED]], now)
        return {
            "epoch": self._epoch,
            "rounds": self._rounds,
            "problem": self._problem,
            **_shown(snapshot),
            "waiting_jobs": len(snapshot.waiting),
            "waiting": {job_id: [reason.code for reason in why.reasons] for job_id, why in waiting.items() if why},
        }


def _shown(snapshot: Snapshot) -> dict[str, Any]:
    held = {f"{job}/{attempt}": holding for (job, attempt), holding in snapshot.held.items()}
    nodes = snapshot.nodes.items()
    return {
        "nodes": {name: {"kind": node.kind, "slots": node.slots, "draining": node.draining} for name, node in nodes},
        "running": {name: one.placement.nodes for name, one in held.items() if not one.parked},
        "parked": {name: one.placement.nodes for name, one in held.items() if one.parked},
        "giving_way": {name: str(one.yielding) for name, one in held.items() if one.yielding is not None},
    }
