"""`make bench-live`: the live scheduler over a real, durable PostgreSQL; nodes and drivers are fakes behind their ports.

    python benchmarks/live_scheduler.py [--jobs 50000] [--tenants 1000] [--nodes 50]

Three figures: from a job's row to its grant; a new scheduler's first decision with 10,000 waiting jobs; short jobs drained, every
row and event of theirs written (the jobs themselves take no time). Results go to benchmarks/results/live_scheduler.{json,md}."""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from builders_db import make_job, make_tenant  # noqa: E402

from app.db.embedded import EmbeddedPostgres  # noqa: E402
from app.db.migrate import migrate  # noqa: E402
from app.db.scheduler_store import SqlSchedulerStore  # noqa: E402
from app.db.session import Database  # noqa: E402
from benchmarks.hardware import hardware  # noqa: E402
from cluster.core.job import Node  # noqa: E402
from cluster.ports import Attempt, NodeReport, SchedulerParts, SchedulerSettings, StagedModel  # noqa: E402
from cluster.scheduler import Scheduler  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SLOTS = 8

_ENDED = """
WITH ended AS (
    UPDATE jobs SET state = 'succeeded', started_at = clock_timestamp(), finished_at = clock_timestamp(), ran_s = ran_s + 1,
        state_since = clock_timestamp(), progress_at = clock_timestamp(), last_seq = last_seq + 3
    FROM unnest(%s::text[], %s::int[]) AS v(id, attempt)
    WHERE jobs.id = v.id AND jobs.attempt = v.attempt AND jobs.state = 'preparing'
    RETURNING jobs.id, jobs.tenant_id, jobs.attempt, jobs.last_seq)
INSERT INTO events (job_id, seq, id, tenant_id, type, level, message, data, attempt)
SELECT id, last_seq - 2 + n, 'ftevent-' || gen_random_uuid(), tenant_id, 'state', 'info', state, '{}', attempt
FROM ended, unnest(ARRAY['running', 'archiving', 'succeeded']) WITH ORDINALITY AS states(state, n0), LATERAL (SELECT n0 - 1 AS n) AS x
"""

_COPY = """
INSERT INTO jobs (id, tenant_id, state, priority, request, method, training_type, task, hyperparams, precision, resource_config,
    shape, estimate, base_model_id, dataset_id, lock, fingerprint, output_model, metadata, created_by)
SELECT %(prefix)s || n, 'tenant-' || (n %% %(tenants)s), state, priority, request, method, training_type, task, hyperparams, precision,
    resource_config, shape, estimate, base_model_id, dataset_id, lock, fingerprint, output_model, metadata, created_by
FROM jobs, generate_series(1, %(count)s) AS n WHERE id = %(template)s
"""


class ManyNodes:
    """`cluster.ports.Nodes`: idle machines that answer at once."""

    def __init__(self, count: int) -> None:
        self._reports = [NodeReport(Node(f"n{n:03}", "A100-80GB", SLOTS, 80.0)) for n in range(count)]

    def reports(self) -> Sequence[NodeReport]:
        return self._reports

    def end_attempt(self, node: str, job_id: str, attempt: int) -> bool | None:
        return True

    def expect(self, node: str, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        return ()

    def stage_ahead(self, node: str, model: StagedModel) -> None: ...

    def prepare_ahead(self, node: str, coming: Any) -> None: ...


class QuickDrivers:
    """`cluster.ports.DriverLauncher`: every job is done as soon as it starts; what drivers write is written, in batches."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._started: queue.SimpleQueue[Attempt | None] = queue.SimpleQueue()
        self.holds = False
        """Jobs that start do not end."""
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def start(self, job_id: str, attempt: int) -> None:
        if not self.holds:
            self._started.put((job_id, attempt))

    def alive(self, job_id: str, attempt: int) -> bool | None:
        return True

    def nudge(self, job_id: str, attempt: int) -> None: ...

    def end(self, job_id: str, attempt: int) -> None: ...

    def close(self) -> None:
        self._started.put(None)
        self._thread.join(30)

    def _write(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while (first := self._started.get()) is not None:
                time.sleep(0.02)  # what starts together ends together
                batch = [first]
                while not self._started.empty() and (more := self._started.get()) is not None:
                    batch.append(more)
                connection.execute(_ENDED, [[job_id for job_id, _ in batch], [attempt for _, attempt in batch]])


class Bench:
    def __init__(self, dsn: str, nodes: int, tenants: int) -> None:
        self.dsn = dsn
        self.database = Database(dsn)
        self.drivers = QuickDrivers(dsn)
        self._nodes = ManyNodes(nodes)
        self._tenants = tenants
        with self.database.platform() as session:
            for number in range(tenants):
                make_tenant(session, f"tenant-{number}")
            shape = {"slots": 1, "memory_gb": 1.0, "kinds": [], "nodes": 1}
            self._template = make_job(session, "tenant-0", state="paused", shape=shape).id

    def scheduler(self) -> Scheduler:
        store = SqlSchedulerStore(self.database)
        return Scheduler(lambda: SchedulerParts(store, self.drivers, SchedulerSettings()), self._nodes)

    @contextmanager
    def running(self) -> Iterator[Scheduler]:
        scheduler = self.scheduler()
        thread = threading.Thread(target=scheduler.run)
        thread.start()
        try:
            yield scheduler
        finally:
            scheduler.stop()
            thread.join(60)

    def submit(self, prefix: str, count: int) -> None:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            wanted = {"prefix": prefix, "count": count, "tenants": self._tenants, "template": self._template}
            connection.execute(_COPY, wanted)
            connection.execute("UPDATE jobs SET state = 'queued' WHERE id LIKE %s", [f"{prefix}%"])

    def ask(self, statement: str) -> list[Any]:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(statement).fetchall()

    def count(self, condition: str) -> int:
        return int(self.ask(f"SELECT count(*) FROM jobs WHERE {condition}")[0][0])

    # The figures ----------------------------------------------------------------------------------------------------

    def latency(self, count: int) -> dict[str, float]:
        """Seconds from the commit of a job's row to the commit of its grant, one job after another, by one clock."""
        waits = []
        with self.running() as scheduler:
            _until(lambda: scheduler.state().get("nodes"), 30)
            for number in range(count):
                self.submit(f"latency-{number}-", 1)
                began = time.perf_counter()
                _until(lambda: self.count(f"id LIKE 'latency-{number}-%' AND attempt = 1"), 30)  # noqa: B023
                waits.append(time.perf_counter() - began)
        return {"p50_s": statistics.median(waits), "p99_s": statistics.quantiles(waits, n=100)[98], "jobs": count}

    def rebuild(self, waiting: int) -> dict[str, float]:
        """A scheduler that starts on a full cluster with so many waiting jobs: until it has decided once."""
        self.drivers.holds = True
        self.submit("rebuild-", waiting + 400)
        first = self.scheduler()
        first.open()
        for _ in range(3):
            first.round()
        began = time.perf_counter()
        second = self.scheduler()
        second.open()
        second.round()
        seconds = time.perf_counter() - began
        left = self.count("state = 'queued'")
        self.ask("UPDATE jobs SET state = 'cancelled' WHERE id LIKE 'rebuild-%' RETURNING 1")
        self.drivers.holds = False
        while second.round():
            continue
        return {"seconds": seconds, "waiting": left}

    def drain(self, count: int) -> dict[str, float]:
        """From the moment that a scheduler starts until every job has ended and every lease is closed."""
        self.submit("drain-", count)
        began = time.perf_counter()
        with self.running() as scheduler:
            _until(lambda: not self.count("id LIKE 'drain-%' AND state <> 'succeeded'"), 3600, every_s=1.0)
            _until(lambda: not self.ask("SELECT 1 FROM lease_slots LIMIT 1"), 60)
            seconds = time.perf_counter() - began
            rounds = scheduler.state()["rounds"]
        return {"jobs": count, "seconds": seconds, "jobs_per_s": count / seconds, "rounds": rounds}


def _until(true: Callable[[], object], timeout_s: float, every_s: float = 0.002) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(every_s)


def table(found: dict[str, Any]) -> str:
    latency, rebuild, drain = found["latency"], found["rebuild"], found["drain"]
    rows = [
        ("submit → grant committed, p50", f"{latency['p50_s'] * 1000:.0f} ms", ""),
        ("submit → grant committed, p99", f"{latency['p99_s'] * 1000:.0f} ms", ""),
        (f"first decision of a new scheduler, {rebuild['waiting']:,} waiting", f"{rebuild['seconds']:.1f} s", "≤ 10 s"),
        (
            f"{drain['jobs']:,} short jobs of {found['tenants']:,} tenants drained, rows written",
            f"{drain['jobs_per_s']:,.0f} jobs/s",
            "≥ 500",
        ),
    ]
    lines = ["| live scheduler over PostgreSQL, fake nodes | measured | wanted |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    machine = found["hardware"]
    return "\n".join([*lines, "", f"{found['nodes']} nodes × {SLOTS} slots; {json.dumps(machine)}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--tenants", type=int, default=1_000)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hl-"))
    server = EmbeddedPostgres(folder / "pg")
    server.start()
    try:
        migrate(server.dsn())
        bench = Bench(server.dsn(), arguments.nodes, arguments.tenants)
        found: dict[str, Any] = {"hardware": hardware(), "nodes": arguments.nodes, "tenants": arguments.tenants}
        found |= {"latency": bench.latency(100), "rebuild": bench.rebuild(10_000), "drain": bench.drain(arguments.jobs)}
        bench.drivers.close()
        bench.database.close()
    finally:
        server.stop()
        shutil.rmtree(folder)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "live_scheduler.json").write_text(json.dumps(found, indent=1) + "\n")
    (arguments.out / "live_scheduler.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
