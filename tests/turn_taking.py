"""Six jobs of three tenants on two `cpu` slots, one urgent and one long; and a watch over the ledger while they take turns."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psycopg
from heliostat_service import SETTINGS, Row, Service, events, explain_failure, submit, wait_done
from waiting import PATIENCE_S

QUANTUM_S, MIN_RUN_S, SWITCH_S = 8.0, 4.0, 20.0
"""`SWITCH_S`: a bound for the rest of a step, the order and its answer, and a driver that starts on a busy machine."""

TURNS = {
    **SETTINGS,
    "NODE__PARK_GB": "64",
    "SCHEDULER__QUANTUM_S": str(QUANTUM_S),
    "SCHEDULER__MIN_RUN_S": str(MIN_RUN_S),
    "SCHEDULER__LOOK_S": "1",
    "SCHEDULER__YIELD_GRACE_S": "20",
}


@dataclass(frozen=True)
class Work:
    tenant: str
    steps: int
    priority: str = "normal"

    def body(self) -> Row:
        return {
            "base_model": "tiny",
            "dataset_id": "colours",
            "priority": self.priority,
            "hyperparams": {"lr": 1e-3, "batch_size": 4, "epochs": 100, "max_steps": self.steps, "seed": 7},
            "resource_config": {"gpu_type": "cpu", "num_gpus": 1},
        }


SHORT = 150
URGENT = Work("initech", SHORT, "urgent")
QUANTA = 3
"""So long does the long training last: it gives way to the others, however fast this machine is."""


def work(long: int) -> tuple[Work, ...]:
    """`long`: steps of the first job."""
    return Work("acme", long), Work("acme", SHORT), *[Work("globex", SHORT)] * 2, Work("initech", SHORT)


def steps_of_long(service: Service, measured: str) -> int:
    """`measured`: a job that ran alone on this machine."""
    with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
        found = connection.execute("SELECT avg(seconds) FROM steps WHERE job_id = %s", [measured]).fetchone()
    assert found is not None
    return math.ceil(QUANTA * QUANTUM_S / float(found[0]))


@dataclass
class Ledger:
    """What was seen, some times a second. `conflicts`: a slot held twice, or rows that contradict each other."""

    seen: int = 0
    conflicts: list[str] = field(default_factory=list)
    slot_s: Counter[str] = field(default_factory=Counter)
    """Slot-seconds by tenant, while all of them have unfinished jobs."""

    def take(self, leases: list[tuple[str, str, list[int], Any]], slots: set[tuple[str, int]], since_s: float) -> None:
        self.seen += 1
        held = [(node, slot) for _, node, numbers, parked in leases if parked is None for slot in numbers]
        if len(set(held)) != len(held):
            self.conflicts.append(f"held twice: {sorted(held)}")
        if set(held) != slots:
            self.conflicts.append(f"leases say {sorted(held)}, slots say {sorted(slots)}")
        for tenant, _, numbers, parked in leases:
            if parked is None:
                self.slot_s[tenant] += since_s * len(numbers)  # type: ignore[assignment]


@contextmanager
def watched(service: Service, tenants: set[str]) -> Iterator[Ledger]:
    ledger, stop = Ledger(), threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not stop.wait(0.1):
            try:
                look = _look(service)
            except psycopg.OperationalError:
                continue
            now = time.monotonic()
            since_s = now - last if look[2] >= tenants else 0.0
            ledger.take(look[0], look[1], since_s)
            last = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield ledger
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def _look(service: Service) -> tuple[list[tuple[str, str, list[int], Any]], set[tuple[str, int]], set[str]]:
    """Open leases, held slots, and tenants with unfinished jobs, at one moment."""
    with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        leases = connection.execute(
            "SELECT tenant_id, node, slots, parked_at FROM leases WHERE released_at IS NULL"
        ).fetchall()
        slots = {(node, slot) for node, slot in connection.execute("SELECT node, slot FROM lease_slots").fetchall()}
        unfinished = connection.execute(
            "SELECT DISTINCT tenant_id FROM jobs WHERE state NOT IN ('succeeded', 'failed', 'cancelled')"
        ).fetchall()
        return leases, slots, {tenant for (tenant,) in unfinished}


def run_alone(service: Service, client: httpx.Client, steps: int) -> str:
    job_id = submit(client, **Work("", steps).body())
    assert wait_done(client, job_id)["status"] == "succeeded", explain_failure(service, client, job_id)
    return job_id


@dataclass(frozen=True)
class Waits:
    """Of the urgent job, seconds. `reasons`: the codes that its explanations gave while it waited."""

    until_granted_s: float
    until_running_s: float
    reasons: frozenset[str]


def follow_urgent(service: Service, client: httpx.Client, job_id: str) -> Waits:
    began = time.monotonic()
    reasons: set[str] = set()
    granted_s = None
    while True:
        told = client.get(f"/finetune/{job_id}/explain").json()
        if told["state"] == "queued":
            reasons |= {reason["code"] for reason in told["reasons"]}
        elif granted_s is None:
            granted_s = time.monotonic() - began
        if told["state"] not in ("queued", "preparing"):
            return Waits(granted_s or 0.0, time.monotonic() - began, frozenset(reasons))
        assert time.monotonic() - began < 120, events(client, job_id)
        time.sleep(0.1)


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def turns_of(service: Service, job_ids: list[str]) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
        for job_id, turns in connection.execute("SELECT id, turns FROM jobs WHERE id = ANY(%s)", [job_ids]).fetchall():
            found[job_id] = turns
    return found
