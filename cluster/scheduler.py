"""The scheduler: rows are the wish, agents say what is, one round closes the difference. It keeps nothing that a crash
could lose. Without Ray; `cluster.client` makes it an actor."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.core.events import Grant, JobGranted, JobRemoved
from cluster.core.explain import explain
from cluster.core.job import ACTIVE, JobState
from cluster.core.state import ClusterState, Holding, Policy, Snapshot, events_between
from cluster.errors import Fenced, HeliostatError, Unavailable
from cluster.ports import ActiveJob, NodeReport, Nodes, Rows, SchedulerParts

log = logging.getLogger(__name__)

MIN_ROUND_S = 0.05
"""A round's own writes wake it again; this keeps a burst of changes from becoming a busy loop."""

MAX_BACKOFF_S = 10.0

EXPLAINED = 50
"""So many of the waiting jobs, from the first in line, are explained in `state`."""

Attempt = tuple[str, int]


class Scheduler:
    """`open` takes the epoch, `run` works until `stop` or until another scheduler has taken over (raises `Fenced`)."""

    def __init__(
        self, wiring: Callable[[], SchedulerParts], nodes: Nodes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._wiring = wiring
        self._nodes = nodes
        self._clock = clock
        self._stopped = threading.Event()
        self._epoch = 0
        self._rounds = 0
        self._problem: str | None = None
        self._view: tuple[Snapshot, float] = (Snapshot(), 0.0)  # replaced whole: `state` is called from other threads
        self._away = True  # the database, or this scheduler, was not there: see `_postpone_judgement`
        self._judge_from = 0.0
        self._ahead = math.inf  # the database's clock, of ours
        self._changed = False
        self._missing: dict[Attempt, float] = {}  # driver not found; when first
        self._launched: set[Attempt] = set()  # by this scheduler: never launched twice

    def open(self) -> None:
        """Raises `Unavailable`."""
        self._parts = self._wiring()
        self._state = ClusterState(Policy(self._parts.settings.reserve_after_s))
        self._epoch = self._parts.store.take_epoch()
        self._away = True
        log.info("scheduler epoch %d", self._epoch)

    def run(self) -> None:
        pause_s = MIN_ROUND_S
        while not self._stopped.wait(pause_s):
            try:
                if not self._epoch:
                    self.open()
                if not self.round():
                    self._parts.store.wait_for_change(self._parts.settings.poll_s)
            except Unavailable as error:
                self._problem = error.message
                self._away = True
                pause_s = min(MAX_BACKOFF_S, max(0.5, pause_s * 2))
                log.warning("%s; trying again in %.1f s", error.message, pause_s)
            else:
                self._problem = None
                pause_s = MIN_ROUND_S

    def stop(self) -> None:
        self._stopped.set()

    def round(self) -> bool:
        """One look and what follows from it; whether a row changed, so that another look is due at once. Safe to be cut
        off anywhere: the next round finds the same difference. Raises `Unavailable`, `Fenced`."""
        self._changed = False
        rows = self._parts.store.rows()
        self._postpone_judgement(rows.now)
        reports = self._nodes.reports()
        self._parts.store.report_nodes(self._epoch, [report.node for report in reports])
        self._recover_lost(rows)
        self._start_unstarted(rows)
        self._release_ended(rows)
        self._end_strays(rows, reports)
        self._learn(rows, reports)
        self._grant(rows.now)
        self._forget(rows)
        self._view = (self._state.snapshot(), rows.now)
        self._rounds += 1
        return self._changed

    # What is lost -------------------------------------------------------------------------------------------------

    def _recover_lost(self, rows: Rows) -> None:
        for job in rows.active:
            if job.state in ACTIVE:
                with _one_job_at_a_time(job.id, job.attempt):
                    reason = self._fault(job, rows.now)
                    if reason is not None:
                        log.warning("job %s attempt %d: %s", job.id, job.attempt, reason)
                        marked = self._parts.store.mark_recovering(self._epoch, job.id, job.attempt, reason)
                        self._changed |= marked

    def _fault(self, job: ActiveJob, now: float) -> str | None:
        if job.lease is None:
            return "it holds no slots"
        if self._driver_gone(job):
            return "its driver is gone"
        return self._overdue(job, now) if self._clock() >= self._judge_from else None

    def _overdue(self, job: ActiveJob, now: float) -> str | None:
        settings = self._parts.settings
        if _expired(job, now, settings.margin_s):
            return "its lease was not renewed in time"
        if now - job.progress_at > settings.stage_limit_s:
            return f"no progress for {now - job.progress_at:.0f} s"
        return None

    def _postpone_judgement(self, now: float) -> None:
        """While the database was away nobody could renew a lease or record a step, and training went on: healthy
        drivers get the time of a whole lease to say so before anything counts as overdue. So after the machine has
        slept: then the database's clock has gone on without ours."""
        ahead = now - self._clock()
        slept = ahead - self._ahead > self._parts.settings.lease_ttl_s
        self._ahead = ahead
        if self._away or slept:
            self._away = False
            self._judge_from = self._clock() + self._parts.settings.lease_ttl_s

    def _driver_gone(self, job: ActiveJob) -> bool:
        """Two looks, so far apart that a driver that is only being moved or registered is found by the second."""
        key = (job.id, job.attempt)
        if self._never_started(job) or self._parts.launcher.alive(*key) is not False:
            self._missing.pop(key, None)
            return False
        return self._clock() - self._missing.setdefault(key, self._clock()) >= self._parts.settings.driver_gone_s

    def _never_started(self, job: ActiveJob) -> bool:
        """As far as this scheduler knows: the one before may have died between grant and start."""
        return job.state == JobState.PREPARING and (job.id, job.attempt) not in self._launched

    def _start_unstarted(self, rows: Rows) -> None:
        for job in rows.active:
            if not self._never_started(job) or job.lease is None or _expired(job, rows.now, 0):
                continue
            with _one_job_at_a_time(job.id, job.attempt):
                self._start_or_adopt(job)

    def _start_or_adopt(self, job: ActiveJob) -> None:
        """A driver that is there is kept. One that is not may have died together with the last scheduler and left
        processes behind: the attempt begins (again) only when none lives."""
        key = (job.id, job.attempt)
        there = self._parts.launcher.alive(*key)
        if there is False:
            self._parts.launcher.end(*key)
            if not all(self._end_processes(job)):
                return
            log.info("job %s attempt %d had no driver: starting it", *key)
            self._parts.launcher.start(*key)
        if there is not None:
            self._launched.add(key)

    # What has ended -----------------------------------------------------------------------------------------------

    def _release_ended(self, rows: Rows) -> None:
        for job in rows.active:
            if job.state in ACTIVE:
                continue
            with _one_job_at_a_time(job.id, job.attempt):
                self._parts.launcher.end(job.id, job.attempt)
                if self._confirmed_dead(job, rows.now):
                    self._parts.store.release(self._epoch, job.id, job.attempt)
                    self._changed = True

    def _confirmed_dead(self, job: ActiveJob, now: float) -> bool:
        """Every node says so; or those that cannot be asked had a lease that ran out, with a margin: a child without a
        lease has left. A node that answers is believed, whatever the clock says: a live process keeps its slots."""
        answers = self._end_processes(job)
        unknown_is_dead = _expired(job, now, self._parts.settings.margin_s)
        return all(answer is True or (answer is None and unknown_is_dead) for answer in answers)

    def _end_processes(self, job: ActiveJob) -> list[bool | None]:
        return [self._nodes.end_attempt(node, job.id, job.attempt) for node in (job.lease.nodes if job.lease else {})]

    def _end_strays(self, rows: Rows, reports: Sequence[NodeReport]) -> None:
        """Processes of an attempt that holds nothing: a worker that was just spawning while its attempt was ended."""
        known = {(job.id, job.attempt) for job in rows.active}
        for report in reports:
            for job_id, attempt in sorted(report.attempts - known):
                log.warning("node %s still runs job %s attempt %d: ending it", report.node.name, job_id, attempt)
                self._nodes.end_attempt(report.node.name, job_id, attempt)

    # Who is next --------------------------------------------------------------------------------------------------

    def _learn(self, rows: Rows, reports: Sequence[NodeReport]) -> None:
        for event in events_between(self._state.snapshot(), snapshot_of(rows, reports)):
            self._state.apply(event)

    def _grant(self, now: float) -> None:
        for decision in self._state.decide(now):
            self._carry_out(decision)

    def _carry_out(self, grant: Grant) -> None:
        job, placement = grant.job, grant.placement
        ttl_s = self._parts.settings.lease_ttl_s
        attempt = self._parts.store.grant(self._epoch, job, placement, ttl_s)
        if attempt is None:  # cancelled meanwhile, or the rows know better: the next look says which
            self._state.apply(JobRemoved(job.id))
            return
        self._changed = True
        self._state.apply(JobGranted(job.id, attempt, job.tenant, placement))
        with _one_job_at_a_time(job.id, attempt):
            self._parts.launcher.start(job.id, attempt)
            self._launched.add((job.id, attempt))

    def _forget(self, rows: Rows) -> None:
        active = {(job.id, job.attempt) for job in rows.active}
        granted = {(held.job_id, held.attempt) for held in self._state.snapshot().held.values()}
        self._launched &= active | granted
        self._missing = {key: since for key, since in self._missing.items() if key in active}

    # For operators ------------------------------------------------------------------------------------------------

    def ping(self) -> int:
        """The epoch; 0 until the database was reached."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """What it sees, as plain data."""
        if not self._epoch:
            return {"epoch": 0, "problem": self._problem}
        snapshot, now = self._view
        state = ClusterState.rebuilt(snapshot, Policy(self._parts.settings.reserve_after_s))
        waiting = {job.id: explain(state, job.id, now) for job in snapshot.waiting[:EXPLAINED]}
        return {
            "epoch": self._epoch,
            "rounds": self._rounds,
            "problem": self._problem,
            "nodes": {name: {"kind": node.kind, "slots": node.slots} for name, node in snapshot.nodes.items()},
            "running": {f"{job}/{attempt}": held.placement.nodes for (job, attempt), held in snapshot.held.items()},
            "waiting_jobs": len(snapshot.waiting),
            "waiting": {job_id: [reason.code for reason in why.reasons] for job_id, why in waiting.items() if why},
        }


def snapshot_of(rows: Rows, reports: Sequence[NodeReport]) -> Snapshot:
    """The facts as the state machine knows them. Only nodes whose agent answers are there to be granted."""
    held = {
        (job.id, job.attempt): Holding(job.id, job.attempt, job.tenant, job.lease) for job in rows.active if job.lease
    }
    nodes = {report.node.name: report.node for report in reports}
    return Snapshot(nodes, tuple(rows.waiting), held, dict(rows.slot_limits))


def _expired(job: ActiveJob, now: float, margin_s: float) -> bool:
    return now > job.lease_expires_at + margin_s


@contextmanager
def _one_job_at_a_time(job_id: str, attempt: int) -> Iterator[None]:
    """What goes wrong with one job is logged and tried again next round; it must not stop the others."""
    try:
        yield
    except (Unavailable, Fenced):
        raise
    except HeliostatError:
        log.exception("job %s attempt %d", job_id, attempt)
