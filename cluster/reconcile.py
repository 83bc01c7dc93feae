"""The difference between what the rows say of attempts and what is: drivers that are gone, were never started, or outlive their
attempt; leases and orders that are overdue; processes that hold nothing. Each is closed as far as it can be now."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

from cluster.asking import PENDING, Asking, Pending
from cluster.core.job import ACTIVE, JobState
from cluster.errors import HeliostatError
from cluster.facts import Facts
from cluster.ports import ActiveJob, Attempt, NodeReport, Nodes, SchedulerParts

log = logging.getLogger(__name__)


class Reconciler:
    """Works on `facts`; what it writes is told by `changed`, to be read again."""

    def __init__(
        self, parts: SchedulerParts, nodes: Nodes, facts: Facts, asking: Asking, clock: Callable[[], float]
    ) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._nodes = nodes
        self._facts = facts
        self._asking = asking
        self._clock = clock
        self.changed: set[str] = set()
        self._missing: dict[Attempt, float] = {}  # driver not found; when first
        self._launched: set[Attempt] = set()  # by this scheduler: never launched twice
        self._fresh: set[Attempt] = set()  # granted by this scheduler: there is nothing of them yet
        self._judge_from = 0.0
        self._ahead = math.inf  # the database's clock, of ours

    def judge_later(self) -> None:
        """While the database was away nobody could renew a lease or record a step, and training went on: healthy
        drivers get the time of a whole lease to say so before anything counts as overdue."""
        self._judge_from = self._clock() + self._settings.lease_ttl_s

    def notice_sleep(self) -> None:
        """After the machine has slept, the database's clock has gone on without ours: nobody could renew either."""
        ahead = self._facts.now - self._clock()
        if ahead - self._ahead > self._settings.lease_ttl_s:
            self.judge_later()
        self._ahead = ahead

    def granted(self, attempts: Iterable[Attempt]) -> None:
        self._fresh.update(attempts)
        for key in list(self._fresh):
            self._start(key)

    def round(self, epoch: int) -> None:
        self.changed = set()
        dead: list[Attempt] = []
        for active in list(self._facts.active()):
            if active.state in ACTIVE:
                self._watch(active, epoch)
            elif self._has_left(active):
                dead.append(active.key)
        if dead:
            self._parts.store.release(epoch, sorted(dead))
            self.changed |= {job_id for job_id, _ in dead}
        self._forget()

    # Attempts that should live --------------------------------------------------------------------------------------

    def look_at_drivers(self, ask: bool) -> None:
        """Who answers, who is not there. `ask`: anew; else only answers that have come since are taken."""
        if ask:
            known = self._facts.attempts() | self._fresh
            self._asking.forget(lambda question: isinstance(question, tuple) and question[-2:] not in known)
        for active in self._facts.active():
            question = ("alive", *active.key)
            if (ask and active.state in ACTIVE and not self._never_started(active)) or self._asking.is_open(question):
                self._note(active.key, self._asking.ask(question, self._alive(active.key)))

    def _alive(self, key: Attempt) -> Callable[[], bool | None]:
        return lambda: self._parts.launcher.alive(*key)

    def _note(self, key: Attempt, answer: bool | Pending | None) -> None:
        """Two looks, so far apart that a driver that is only being moved or registered is found by the second."""
        if answer is False:
            first = self._missing.setdefault(key, self._clock())
            if self._clock() - first >= self._settings.driver_gone_s:
                self._missing[key] = -math.inf
        elif answer is not PENDING:
            self._missing.pop(key, None)

    def _watch(self, active: ActiveJob, epoch: int) -> None:
        reason = self._fault(active)
        if reason is not None:
            log.warning("job %s attempt %d: %s", *active.key, reason)
            self._parts.store.mark_recovering(epoch, *active.key, reason)
            self.changed.add(active.id)
        elif active.key in self._fresh:
            self._start(active.key)
        elif self._never_started(active) and not self._expired(active, 0):
            self._start_or_adopt(active)

    def _fault(self, active: ActiveJob) -> str | None:
        if active.lease is None:
            return "it holds no slots"
        if self._missing.get(active.key) == -math.inf:
            return "its driver is gone"
        return self._overdue(active) if self._clock() >= self._judge_from else None

    def _overdue(self, active: ActiveJob) -> str | None:
        now = self._facts.now
        if self._expired(active, self._settings.margin_s):
            return "its lease was not renewed in time"
        if not active.parked and now - active.progress_at > self._settings.stage_limit_s:
            return f"no progress for {now - active.progress_at:.0f} s"
        if active.order is not None and now - active.ordered_at > self._settings.yield_limit_s:
            return f"it did not give way in {now - active.ordered_at:.0f} s"
        return None

    def _expired(self, active: ActiveJob, margin_s: float) -> bool:
        return self._facts.now > active.lease_expires_at + margin_s

    def _never_started(self, active: ActiveJob) -> bool:
        """As far as this scheduler knows: the one before may have died between grant and start."""
        return active.state == JobState.PREPARING and active.key not in self._launched

    def _start(self, key: Attempt) -> None:
        """One that cannot be told to have failed may have got through: it is then looked at as any of unknown past."""
        done = self._asking.ask(("start", *key), lambda: self._launch(key))
        if done is PENDING:
            return
        self._fresh.discard(key)
        if done:
            self._launched.add(key)

    def _launch(self, key: Attempt) -> bool:
        try:
            self._parts.launcher.start(*key)
        except HeliostatError as error:
            log.warning("the driver of job %s attempt %d was not started: %s", *key, error)
            return False
        return True

    def _start_or_adopt(self, active: ActiveJob) -> None:
        """A driver that is there is kept. One that is not may have died together with the last scheduler and left
        processes behind: the attempt begins (again) only when none lives."""
        key = active.key

        def start_or_adopt() -> bool:
            there = self._parts.launcher.alive(*key)
            if there is False:
                self._parts.launcher.end(*key)
                if not all(self._end_processes(active)):
                    return False
                log.info("job %s attempt %d had no driver: starting it", *key)
                self._parts.launcher.start(*key)
            return there is not None

        done = self._asking.ask(("adopt", *key), start_or_adopt)
        if done is True:
            self._launched.add(key)
        elif done is False:
            self._asking.put_off(("adopt", *key))

    # Attempts that should not ---------------------------------------------------------------------------------------

    def _has_left(self, active: ActiveJob) -> bool:
        """Every node says so; or those that cannot be asked had a lease that ran out, with a margin: a child without a
        lease has left. A node that answers is believed, whatever the clock says: a live process keeps its slots."""
        key = active.key
        if any(self._asking.is_open((question, *key)) for question in ("start", "adopt")):
            return False

        def end() -> list[bool | None]:
            self._parts.launcher.end(*key)
            return self._end_processes(active)

        answers = self._asking.ask(("end", *key), end)
        if isinstance(answers, Pending):
            return False
        unknown_is_dead = self._expired(active, self._settings.margin_s)
        if all(answer is True or (answer is None and unknown_is_dead) for answer in answers):
            return True
        self._asking.put_off(("end", *key))
        return False

    def _end_processes(self, active: ActiveJob) -> list[bool | None]:
        nodes = active.lease.nodes if active.lease else {}
        return [self._nodes.end_attempt(node, *active.key) for node in nodes]

    def end_strays(self, reports: Sequence[NodeReport]) -> None:
        """Processes of an attempt that holds nothing: a worker that was just spawning while its attempt was ended. An attempt
        is in the facts before its first process is, and until its last was seen dead."""
        known = self._facts.attempts() | self._fresh
        for report in reports:
            for key in sorted(report.attempts - known):
                log.warning("node %s still runs job %s attempt %d: ending it", report.node.name, *key)
                self._asking.ask(("stray", report.node.name, *key), self._stray(report.node.name, key))

    def _stray(self, node: str, key: Attempt) -> Callable[[], bool | None]:
        return lambda: self._nodes.end_attempt(node, *key)

    def _forget(self) -> None:
        known = self._facts.attempts()
        self._launched &= known | self._fresh
        self._missing = {key: since for key, since in self._missing.items() if key in known}
