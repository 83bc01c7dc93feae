"""`make drill`: SIGKILL to scheduler, agent, drivers, children and the raylet at random moments, while short jobs of three tenants
take turns on two slots.

    python -m tests.drills.turns [--kills 50] [--jobs 30] [--seed 1]

All jobs must succeed, with one row a step and the losses of an undisturbed run, and at no moment may a slot be held twice or a
process of a closed lease live on. Rounds of six jobs and ten kills are lines in benchmarks/drills/turns.jsonl; those that stand
there for this commit are not run again, so an interrupted drill goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from builders_llama import make_tiny_llama  # noqa: E402
from heliostat_service import Service, ended, rows, started, submit, upload, wait_done  # noqa: E402
from kills import TARGETS, StepLoss, losses  # noqa: E402
from turn_taking import TURNS, Ledger, Work, jain, run_alone, watched  # noqa: E402
from waiting import PATIENCE_S  # noqa: E402

from benchmarks.hardware import hardware  # noqa: E402
from cluster.processes import running_attempts  # noqa: E402
from tests.drills.kills import commit  # noqa: E402

RECORD = ROOT / "benchmarks" / "drills" / "turns.jsonl"
TENANTS = ("acme", "globex", "initech")
STEPS = 150
JOBS, KILLS = 6, 10
WEIGHTS = {"scheduler": 3, "agent": 2, "driver": 3, "child": 3, "raylet": 1}
STRAY_S = 5.0
"""A worker that was just spawning when its attempt was ended is found and ended within this time."""

SETTINGS = {**TURNS, "SCHEDULER__MAX_FRUITLESS_ATTEMPTS": "20"}  # so many kills in a row are no fault of a job


@dataclass
class Strays:
    """Processes of attempts whose lease was closed before they were seen. `worst_s`: how long one was seen."""

    since: dict[tuple[str, int], float] = field(default_factory=dict)
    worst_s: float = 0.0

    def look(self, service: Service) -> None:
        with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
            closed = set(
                connection.execute(
                    "SELECT job_id, attempt FROM leases GROUP BY 1, 2 HAVING count(*) = count(released_at)"
                ).fetchall()
            )
        now, seen = time.monotonic(), running_attempts() & closed
        self.since = {key: self.since.get(key, now) for key in seen}
        self.worst_s = max([self.worst_s, *(now - since for since in self.since.values())])


@contextmanager
def hunted(service: Service) -> Iterator[Strays]:
    strays, stop = Strays(), threading.Event()

    def hunt() -> None:
        while not stop.wait(0.5):
            try:
                strays.look(service)
            except psycopg.OperationalError:
                continue

    thread = threading.Thread(target=hunt, daemon=True)
    thread.start()
    try:
        yield strays
    finally:
        stop.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def granted(service: Service) -> set[tuple[str, int]]:
    """Another Heliostat on this machine has attempts too. None while the database is away."""
    try:
        with psycopg.connect(service.dsn(), connect_timeout=5) as connection:
            return set(connection.execute("SELECT DISTINCT job_id, attempt FROM leases").fetchall())
    except psycopg.OperationalError:
        return set()


def find(service: Service, target: str, dice: random.Random) -> int | None:
    if target == "raylet":
        pids = service.pids(lambda process: "/raylet/raylet" in " ".join(process.cmdline()))
    elif target == "child":
        attempts = sorted(running_attempts() & granted(service))
        pids = TARGETS["child"](service, dice.choice(attempts)[0]) if attempts else []
    else:
        pids = TARGETS[target](service, "")
    return dice.choice(sorted(pids)) if pids else None


def kill_at_random(service: Service, dice: random.Random, done: threading.Event) -> Counter[str]:
    """Ten kills, some seconds apart, as long as there are jobs; what was killed."""
    killed: Counter[str] = Counter()
    while killed.total() < KILLS and not done.wait(dice.uniform(1.0, 8.0)):
        target = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        pid = find(service, target, dice)
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed[target] += 1
    return killed


def one_round(service: Service, number: int, seed: int, alone: list[StepLoss]) -> dict[str, Any]:
    """Raises AssertionError."""
    dice = random.Random(f"{seed}/{number}")
    clients = {name: service.tenant(name) for name in TENANTS}
    done, killed = threading.Event(), Counter[str]()
    with watched(service, set(TENANTS)) as ledger, hunted(service) as strays:
        work = [Work(TENANTS[n % 3], STEPS, dice.choice(["normal", "normal", "high", "urgent"])) for n in range(JOBS)]
        jobs = [(one.tenant, submit(clients[one.tenant], **one.body())) for one in work]
        killer = threading.Thread(target=lambda: killed.update(kill_at_random(service, dice, done)))
        killer.start()
        try:
            ends = [wait_done(clients[tenant], job_id, 900) for tenant, job_id in jobs]
        finally:
            done.set()
            killer.join(60)
    check(service, ends, ledger, strays, alone)
    attempts = [max(row.attempt for row in losses(service, job_id)) for _, job_id in jobs]
    return {
        "jobs": len(jobs),
        "kills": dict(killed),
        "attempts": attempts,
        "looks": ledger.seen,
        "stray_s": round(strays.worst_s, 1),
        "jain": round(jain([*ledger.slot_s.values()] or [1.0]), 3),
    }


def check(service: Service, ends: list[dict[str, Any]], ledger: Ledger, strays: Strays, alone: list[StepLoss]) -> None:
    for seen in ends:
        assert seen["status"] == "succeeded", seen["error"]
        steps = losses(service, seen["id"])
        assert [row.step for row in steps] == list(range(1, STEPS + 1)), "one row per step"
        assert [row.loss for row in steps] == [row.loss for row in alone], "the same number at every step"
    assert ledger.conflicts == [], ledger.conflicts[:3]
    assert strays.worst_s <= STRAY_S, f"a process outlived its lease by {strays.worst_s:.1f} s"


def recorded(now: str) -> list[dict[str, Any]]:
    if not RECORD.exists():
        return []
    lines = [json.loads(line) for line in RECORD.read_text().splitlines()]
    return [line for line in lines if line["commit"] == now]


def record(line: dict[str, Any]) -> None:
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a") as file:
        file.write(json.dumps(line) + "\n")


def drill(service: Service, wanted_kills: int, wanted_jobs: int, seed: int) -> int:
    """Rounds until there were so many kills and jobs; how many failed."""
    now = commit()
    alone = losses(service, run_alone(service, service.client(), STEPS))
    failures = 0
    while True:
        lines = recorded(now)
        kills = sum(sum(line.get("kills", {}).values()) for line in lines)
        if (kills >= wanted_kills and sum(line.get("jobs", 0) for line in lines) >= wanted_jobs) or failures > 2:
            return failures
        began = time.monotonic()
        line: dict[str, Any] = {"commit": now, "round": len(lines), "seed": seed, "hardware": hardware()}
        try:
            line |= {"ok": True, **one_round(service, len(lines), seed, alone)}
        except AssertionError as error:
            failures += 1
            line |= {"ok": False, "error": str(error)[:2000]}
        line["seconds"] = round(time.monotonic() - began, 1)
        print(json.dumps({key: value for key, value in line.items() if key != "hardware"}), flush=True)
        record(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    service = started(SETTINGS)
    try:
        folder = service.data_dir / "tiny"
        make_tiny_llama(folder)
        service.add_base_model("tiny", folder)
        for client in (service.client(), *(service.tenant(name) for name in TENANTS)):
            upload(client, "colours", rows(64))
        failures = drill(service, arguments.kills, arguments.jobs, arguments.seed)
    finally:
        ended(service)
    sys.exit(f"{failures} rounds failed" if failures else 0)


if __name__ == "__main__":
    main()
