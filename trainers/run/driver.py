"""One attempt of a job from its assignment to its end: prepares the node, runs the worker group, renews the lease, writes
what happens. Without Ray; `trainers.run.launch` makes it an actor."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.core.job import JobState, Wish
from cluster.errors import Fenced, HeliostatError, Unavailable
from cluster.storage.objects import ObjectStore
from trainers.run.conversation import Conversation, Intent, Listeners
from trainers.run.limits import Limits
from trainers.run.parts import Agents, DriverParts, Gang, GangRequest, Order, Outcome, Record, WorkersLost, WorkerTask
from trainers.run.ports import OUT_OF_MEMORY, Assignment
from trainers.run.preparing import CPU, fewer_rows, lineage, parts_of, prepare
from trainers.run.records import RecordWriter
from trainers.run.turns import TurnActions, Turns

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
"""At most; a lease with a short time to live is renewed three times in it. Wishes of the tenant are seen so fast, orders of the
scheduler at once: it nudges."""

_FORCED_S = 15.0
_LEAVE_S = 15.0
_OWN_WORD_S = 5.0
"""For the node of a rank that is gone to say why: its log is stored first."""
_INTENTS = {Wish.CANCEL: Intent.CANCEL, Wish.PAUSE: Intent.PAUSE}


class JobDriver:
    """`run` blocks; `relay`, `task`, `nudge` and `ping` are called meanwhile, by other threads."""

    def __init__(self, job_id: str, attempt: int, parts: DriverParts, agents: Agents, gang: Gang) -> None:
        self._job = (job_id, attempt)
        self._store = parts.store
        self._settings = parts.settings
        self._agents = agents
        self._gang = gang
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        waiting = parts.settings.max_waiting_records
        self._writer = RecordWriter(waiting, self._on_fenced, self._on_refused, self._on_broken)
        self._woken = threading.Event()
        listeners = Listeners(self._outcomes.put, self.nudge, self._discard)
        self._conversation = Conversation(self._job, parts.store, self._writer, listeners)
        self._turns = Turns(
            self._conversation, TurnActions(self._give_way, self._free_slots), parts.settings.yield_grace_s
        )
        self._limits = Limits(parts.store)
        self._leaving = threading.Event()
        self._broken = False
        self._clearing = False
        self._assignment: Assignment | None = None
        self._refusal: HeliostatError | None = None
        self._tasks: dict[str, WorkerTask] = {}
        self._gang_over = threading.Event()
        self._gang_started = 0.0
        self._stopped_at: float | None = None

    def ping(self) -> str:
        return "ok"

    def nudge(self) -> None:
        """Look at the rows now: there is an order, or something to tell."""
        self._woken.set()

    def task(self, node: str) -> WorkerTask:
        """For a node's worker that has come up."""
        if node not in self._tasks or self._clearing:
            raise RuntimeError(f"a worker started on {node} before its task was there, or when it was over")
        if self._leads(node):
            self._conversation.stage("worker_start", time.monotonic() - self._gang_started)
        return self._tasks[node]

    def relay(self, node: str, records: list[Record]) -> list[Order]:
        if self._leads(node):
            return self._conversation.relay(records)
        return self._conversation.relay_companion(node, records)

    def _leads(self, node: str) -> bool:
        return node == next(iter(self._tasks))

    def run(self) -> None:
        """Returns when all is written and nothing of the attempt is left to wait for, or when fenced. Raises
        RuntimeError when the driver itself broke: the scheduler then finds it dead."""
        self._writer.start()
        self._start_thread(self._keep_lease)
        self._start_thread(self._train)
        outcome = self._once_more(self._first_hand(self._outcomes.get()))  # the first word counts
        log.info("attempt %s ends: %s, %s", self._job, outcome.state, outcome.reason)
        self._clear()
        if outcome.state is None:
            self._writer.abandon()
        else:
            self._writer.submit(lambda: self._write_end(outcome))
        self._writer.close()
        self._leaving.set()
        self._woken.set()
        if self._broken:
            raise RuntimeError(f"the driver of {self._job} broke; see its log")

    def _first_hand(self, outcome: Outcome) -> Outcome:
        if len(self._tasks) < 2 or not outcome.is_hearsay:
            return outcome
        deadline = time.monotonic() + _OWN_WORD_S
        while (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                other = self._outcomes.get(timeout=left)
                if other.state is None or (other.error is not None and not other.is_hearsay):
                    return other
        return outcome

    def _once_more(self, outcome: Outcome) -> Outcome:
        """Where memory ran out the next attempt has fewer rows in a forward pass, once; one rank alone has tried that itself."""
        assignment, error = self._assignment, outcome.error or {}
        if outcome.state is not JobState.FAILED or assignment is None or error.get("code") not in OUT_OF_MEMORY:
            return outcome
        halved_itself = (
            error["code"] == "out_of_memory"
            and assignment.placement.slots == 1
            and assignment.hyperparams.offload != "parameters"
        )
        rows = fewer_rows(assignment)
        if assignment.short_of_memory or halved_itself or rows == 0 or assignment.script is not None:
            return outcome
        told = f"it ran out of memory: once more with at most {rows} row(s) in a forward pass"
        return dataclasses.replace(outcome, state=JobState.RECOVERING, reason=told)

    def _start_thread(self, target: Callable[[], None]) -> None:
        """A thread that dies of what nobody foresaw takes the driver along: better dead than half alive."""

        def guarded() -> None:
            clean = False
            try:
                target()
                clean = True
            finally:
                if not clean:
                    self._on_broken()

        threading.Thread(target=guarded, name=target.__name__, daemon=True).start()

    def _on_fenced(self) -> None:
        self._writer.abandon()
        self._outcomes.put(Outcome(None, "another attempt owns the job"))

    def _on_refused(self, error: HeliostatError) -> None:
        """The next attempt would bring the same value. The training may have ended by then: see `_write_end`."""
        log.warning("attempt %s: a record was refused: %s", self._job, error)
        self._refusal = error
        self._outcomes.put(_refused(error))

    def _on_broken(self) -> None:
        self._broken = True
        self._writer.abandon()
        self._outcomes.put(Outcome(None, "the driver broke"))

    # ── the work ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _train(self) -> None:
        try:
            self._prepare_and_run()
        except Fenced:
            self._on_fenced()
        except WorkersLost as lost:
            self._outcomes.put(Outcome(JobState.RECOVERING, str(lost)))
        except HeliostatError as error:
            state = JobState.RECOVERING if isinstance(error, Unavailable) else JobState.FAILED
            self._outcomes.put(Outcome(state, error.message, error.as_dict()))

    def _prepare_and_run(self) -> None:
        assignment = self._assignment = self._read_assignment()
        self._tasks = prepare(assignment, self._agents, self._settings, self._conversation.stage)
        _, *companions = self._tasks
        self._conversation.with_companions(companions)
        name = f"{assignment.tenant}-{assignment.job_id}-a{assignment.attempt}"
        self._gang_started = time.monotonic()
        try:
            self._gang.run(GangRequest(*self._job, name, tuple(self._tasks), assignment.fingerprint))
        finally:
            self._gang_over.set()
        self._outcomes.put(Outcome(JobState.RECOVERING, "the worker left without saying how the training ended"))

    def _read_assignment(self) -> Assignment:
        while True:
            try:
                return self._store.assignment(*self._job)
            except Unavailable:
                if self._leaving.wait(1.0):
                    raise

    # ── the lease, the tenant's wishes, the scheduler's orders ──────────────────────────────────────────────────────

    def _keep_lease(self) -> None:
        while not self._leaving.is_set():
            self._woken.clear()
            self._beat()
            self._watch_limits()
            self._watch_stop()
            self._woken.wait(min(self._settings.lease_ttl_s / 3, HEARTBEAT_S))

    def _beat(self) -> None:
        try:
            beat = self._store.heartbeat(*self._job, self._settings.lease_ttl_s)
        except Unavailable:  # training goes on without the database; so does the lease, which nobody can take meanwhile
            return
        if beat.fenced:
            self._on_fenced()
        elif beat.wish in _INTENTS:
            self._stop(_INTENTS[beat.wish])
        elif self._conversation.intent is None and not self._conversation.archiving:
            parks = self._assignment is not None and self._assignment.kind == CPU
            self._turns.follow(beat, parks, time.monotonic())

    def _discard(self, prefix: str) -> None:
        """Of a checkpoint whose row is gone. What cannot be deleted now only takes room."""
        try:
            ObjectStore(self._settings.storage_url).delete_prefix(prefix)
        except (HeliostatError, OSError) as error:
            log.warning("the objects of %s stay though nothing names them: %s", prefix, error)

    def _give_way(self) -> None:
        self._stop(Intent.SUSPEND)

    def _free_slots(self) -> bool:
        """Asked again with the next beat when it could not be written."""
        try:
            return self._store.park(*self._job)
        except (Unavailable, Fenced) as error:
            log.info("the slots of %s are not free yet: %s", self._job, error.message)
            return False

    def _stop(self, intent: Intent, leads_to: Outcome | None = None) -> None:
        """Once per intent; a higher one overtakes. What is being archived is too late to stop."""
        conversation = self._conversation
        if conversation.archiving or (conversation.intent is not None and conversation.intent.rank >= intent.rank):
            return
        started = conversation.started
        conversation.stop(intent, leads_to)
        self._stopped_at = time.monotonic()
        if not started:  # no child hears it
            self._outcomes.put(conversation.stopped())

    def _watch_limits(self) -> None:
        conversation, assignment = self._conversation, self._assignment
        if assignment is None or not conversation.clock.started or conversation.intent is not None:
            return
        reached = self._limits.reached(assignment, assignment.ran_s + conversation.clock.seconds())
        if reached is not None:
            self._stop(Intent.LIMIT, reached)

    def _watch_stop(self) -> None:
        """A child that does not stop in time is killed; a worker that does not answer to that is left behind."""
        intent = self._conversation.intent
        if intent is None or self._stopped_at is None or self._conversation.archiving:
            return
        graces = {Intent.CANCEL: 0.0, Intent.SUSPEND: self._settings.yield_grace_s}
        grace_s = graces.get(intent, self._settings.stop_grace_s)
        waited_s = time.monotonic() - self._stopped_at
        if waited_s >= grace_s + _FORCED_S:
            self._outcomes.put(self._conversation.stopped())
        elif waited_s >= grace_s:
            self._conversation.kill()

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _clear(self) -> None:
        self._clearing = True
        if len(self._tasks) > 1:  # those that follow wait for a word, and have a log to store
            self._conversation.kill()
            self._gang_over.wait(_LEAVE_S)
        self._gang.end()
        if self._assignment is None:
            return
        for part in parts_of(self._assignment):
            try:
                self._agents.of(part.node).clear_attempt(*self._job)
            except HeliostatError as error:  # the agent clears up itself when it ends the attempt
                log.info("the scratch of %s on %s was not cleared: %s", self._job, part.node, error.message)

    def _write_end(self, outcome: Outcome) -> None:
        if outcome.artifact is not None and self._refusal is not None:  # written before this, in order
            outcome = _refused(self._refusal)
        if outcome.artifact is None:
            if outcome.state is not None:
                self._store.move(*self._job, outcome.state, reason=outcome.reason, error=outcome.error)
            return
        made = outcome.artifact
        try:
            self._store.finish(*self._job, made["prefix"], made["files"], made["metrics"], self._lineage())
        except (Unavailable, Fenced):
            raise
        except HeliostatError as error:
            self._write_end(_refused(error))

    def _lineage(self) -> dict[str, Any]:
        """What a version needs to be made again: data, code, configuration, and the identity of the run."""
        if self._assignment is None or not self._tasks:
            raise RuntimeError("an artifact came before the task that makes it")
        return {
            **lineage(self._assignment),
            "hyperparams": dataclasses.asdict(self._assignment.hyperparams),
            "method": self._assignment.method,
            "task": self._assignment.task,
            "training_type": self._assignment.training_type,
            "attempt": self._assignment.attempt,
            "kind": self._assignment.kind,
            "world_size": self._assignment.placement.slots,
            "threads_per_slot": next(iter(self._tasks.values())).threads,
            "packages": self._conversation.hello,
            "run": self._conversation.ready,
        }


def _refused(error: HeliostatError) -> Outcome:
    return Outcome(JobState.FAILED, error.message, error.as_dict())
