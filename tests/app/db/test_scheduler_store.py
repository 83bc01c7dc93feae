"""What the scheduler reads and writes: epochs, leases, recovery, wishes, and a ledger that never holds a slot twice."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from builders_db import core_job, grant, granted_job, make_base_model, make_node, make_tenant, queued_job
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, text, update

from app.db.job_store import SqlJobStore
from app.db.models import EnvironmentCheck, Job, Lease, LeaseSlot, Node
from app.db.scheduler_store import SqlSchedulerStore, _check_epoch
from app.db.session import Database
from app.db.transitions import ask
from cluster.core.events import Grant
from cluster.core.job import JobState, Placement, TenantShare, Wish
from cluster.core.job import Node as CoreNode
from cluster.errors import Fenced, Unavailable
from cluster.ports import EnvironmentCheck as ReportedCheck
from cluster.ports import NodeReport
from trainers.run.ports import StepRow

S = JobState
GENERATE_ONLY = [Phase.explicit, Phase.reuse, Phase.generate]  # a race does not shrink
LONG_S = 60.0
"""No change takes so long to be heard of."""
HERE = Placement({"n1": (0,)})


@pytest.fixture
def store(database: Database) -> SqlSchedulerStore:
    return SqlSchedulerStore(database, max_fruitless_attempts=2)


@pytest.fixture
def epoch(store: SqlSchedulerStore) -> int:
    return store.take_epoch()


def state(database: Database, job_id: str) -> str:
    with database.platform() as session:
        return session.execute(select(Job.state).where(Job.id == job_id)).scalar_one()


def held(database: Database) -> int:
    with database.platform() as session:
        return session.scalar(select(func.count()).select_from(LeaseSlot)) or 0


def lose(store: SqlSchedulerStore, epoch: int, job_id: str, attempt: int) -> None:
    assert store.mark_recovering(epoch, job_id, attempt, "node lost")
    store.release(epoch, [(job_id, attempt)])


def wish(database: Database, job_id: str, wish: Wish) -> None:
    with database.platform() as session:
        job = session.get(Job, job_id)
        assert job is not None
        ask(session, job, wish)


def test_a_grant_takes_the_slots_and_a_release_gives_them_back(
    database: Database, store: SqlSchedulerStore, epoch: int
) -> None:
    with database.platform() as session:
        make_node(session, "n1", kind="A100")
    job_id = granted_job(database, store, epoch)
    rows = store.rows()
    assert rows.waiting == []
    (active,) = rows.active
    assert (active.state, active.attempt, active.lease) == (S.PREPARING, 1, HERE)
    assert 20 < active.lease_expires_at - rows.now < 31
    with database.platform() as session:
        job = session.get(Job, job_id)
        assert job is not None and job.granted is not None
        assert (job.granted["gpu_type"], job.granted["nodes"]) == ("A100", {"n1": [0]})
    lose(store, epoch, job_id, 1)
    rows = store.rows()
    assert [(job.id, job.attempt) for job in rows.waiting] == [(job_id, 1)] and rows.active == []
    assert held(database) == 0


def test_a_slot_that_is_held_is_not_granted(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    granted_job(database, store, epoch, slot=0)
    other = queued_job(database)
    assert grant(store, epoch, other, Placement({"n0": (1,), "n1": (0, 1)})) is None
    assert state(database, other) == "queued" and held(database) == 1
    assert grant(store, epoch, other, Placement({"n1": (1,)})) == 1


def test_only_a_waiting_job_is_granted(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    gone = queued_job(database)
    wish(database, gone, Wish.CANCEL)
    assert state(database, gone) == "cancelled"
    stale = core_job(queued_job(database), attempt=5)
    for job in (core_job(gone), stale, core_job("ftjob-none")):
        assert store.grant(epoch, [Grant(job, HERE, job.shape)], 30.0) == {}
    assert held(database) == 0


def test_an_old_scheduler_changes_nothing(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    job_id, waiting = granted_job(database, store, epoch), queued_job(database)
    assert store.take_epoch() == epoch + 1
    for write in (
        lambda: grant(store, epoch, waiting, Placement({"n1": (1,)})),
        lambda: store.mark_recovering(epoch, job_id, 1, "x"),
        lambda: store.release(epoch, [(job_id, 1)]),
        lambda: store.report_nodes(epoch, []),
    ):
        with pytest.raises(Fenced):
            write()
    assert (state(database, job_id), state(database, waiting), held(database)) == ("preparing", "queued", 1)


def test_a_job_whose_last_attempt_is_still_leaving_waits(
    database: Database, store: SqlSchedulerStore, epoch: int
) -> None:
    job_id = granted_job(database, store, epoch)
    SqlJobStore(database).move(job_id, 1, S.PAUSED, reason="")
    with database.platform() as session:
        session.execute(update(Job).values(state="queued"))
    rows = store.rows()
    assert rows.waiting == [] and [job.id for job in rows.active] == [job_id]
    assert grant(store, epoch, job_id, Placement({"n1": (1,)}), 1) is None
    store.release(epoch, [(job_id, 1)])
    assert [job.id for job in store.rows().waiting] == [job_id]


def test_a_job_in_an_active_state_without_a_lease_is_shown(database: Database, store: SqlSchedulerStore) -> None:
    job_id = queued_job(database, state="running", attempt=3)
    (active,) = store.rows().active
    assert (active.id, active.attempt, active.lease) == (job_id, 3, None)


def test_a_job_without_progress_is_given_up(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    job_id = granted_job(database, store, epoch)
    lose(store, epoch, job_id, 1)
    (waiting,) = store.rows().waiting
    assert waiting.not_before > store.rows().now
    assert grant(store, epoch, job_id, HERE, 1) == 2
    lose(store, epoch, job_id, 2)
    with database.platform() as session:
        job = session.get(Job, job_id)
        assert job is not None and job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "gave_up")
        assert "node lost" in job.error["message"] and job.error["hint"]


def test_new_steps_count_as_progress_but_repeated_ones_do_not(
    database: Database, store: SqlSchedulerStore, epoch: int
) -> None:
    driver = SqlJobStore(database)
    job_id = granted_job(database, store, epoch)
    reached = {1: [1], 2: [2], 3: [2], 4: [1, 2]}
    states = []
    for attempt, steps in reached.items():
        driver.record_steps(job_id, attempt, [StepRow(number, 0.1, 1.0, 0.1, 0.1, 1, 0.1) for number in steps])
        lose(store, epoch, job_id, attempt)
        states.append(state(database, job_id))
        grant(store, epoch, job_id, HERE, attempt)
    assert states == ["queued", "queued", "queued", "failed"]


@pytest.mark.parametrize(("asked", "then"), [(Wish.CANCEL, "cancelled"), (Wish.PAUSE, "paused")])
def test_a_wish_that_no_driver_could_follow_is_honoured_at_the_release(
    database: Database, store: SqlSchedulerStore, epoch: int, asked: Wish, then: str
) -> None:
    job_id = granted_job(database, store, epoch)
    wish(database, job_id, asked)
    lose(store, epoch, job_id, 1)
    assert state(database, job_id) == then and held(database) == 0


def test_marking_a_job_of_another_attempt_or_state_does_nothing(
    database: Database, store: SqlSchedulerStore, epoch: int
) -> None:
    job_id = granted_job(database, store, epoch)
    assert not store.mark_recovering(epoch, job_id, 2, "x")
    assert store.mark_recovering(epoch, job_id, 1, "x")
    assert not store.mark_recovering(epoch, job_id, 1, "x")


def test_nodes_are_reported_lost_and_found(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    one, two = (CoreNode(name, "cpu", 2, 4.0, frozenset({"f"})) for name in ("one", "two"))
    for seen, lost in (([one, two], set()), ([two], {"one"}), ([one, two], set()), ([], {"one", "two"})):
        store.report_nodes(epoch, [NodeReport(node) for node in seen])
        with database.platform() as session:
            assert set(session.scalars(select(Node.name).where(Node.lost_at.is_not(None)))) == lost


def test_what_a_node_computes_in_is_kept(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    for able in (True, False):
        store.report_nodes(epoch, [NodeReport(CoreNode("one", "cpu", 2, 4.0), bf16=able)])
        with database.platform() as session:
            assert session.get_one(Node, "one").bf16 is able


def test_the_newest_check_of_each_kind_is_kept(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    node = CoreNode("one", "cpu", 2, 4.0)

    def rows() -> list[tuple[str, str, str, float]]:
        with database.platform() as session:
            found = session.scalars(
                select(EnvironmentCheck).order_by(EnvironmentCheck.fingerprint, EnvironmentCheck.kind)
            )
            return [(one.fingerprint, one.kind, one.status, one.checked_at.timestamp()) for one in found]

    full, quick = ReportedCheck("f", "full", "ok", "", 1e9), ReportedCheck("f", "quick", "ok", "", 1e9 + 1)
    store.report_nodes(epoch, [NodeReport(node, checks=(full, quick))])
    assert rows() == [("f", "full", "ok", 1e9), ("f", "quick", "ok", 1e9 + 1)]
    later = replace(full, status="damaged", detail="lib/a.py", at=1e9 + 2)
    store.report_nodes(epoch, [NodeReport(node, checks=(later, quick))])
    again = SqlSchedulerStore(database)  # a scheduler that does not know what it has written
    again.report_nodes(again.take_epoch(), [NodeReport(node, checks=(full, quick))])
    assert rows() == [("f", "full", "damaged", 1e9 + 2), ("f", "quick", "ok", 1e9 + 1)]
    again.close()


def test_waiting_ends_with_a_change_or_the_timeout(database: Database, store: SqlSchedulerStore, epoch: int) -> None:
    store.wait_for_change(5.0)  # the first one returns at once: anything may have happened before
    began = time.monotonic()
    store.wait_for_change(0.2)
    assert time.monotonic() - began > 0.15
    job_id = queued_job(database)
    began = time.monotonic()
    store.wait_for_change(LONG_S)
    for change in (
        lambda: grant(store, epoch, job_id, HERE),
        lambda: wish(database, job_id, Wish.CANCEL),
        lambda: store.release(epoch, [(job_id, 1)]),
    ):
        timer = threading.Timer(0.05, change)
        timer.start()
        store.wait_for_change(LONG_S)
        timer.join()
    assert time.monotonic() - began < LONG_S, "none of them ran into its timeout"
    store.close()


def test_waiting_survives_a_lost_connection(database: Database, store: SqlSchedulerStore) -> None:
    store.wait_for_change(0.1)
    with database.platform() as session:
        others = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = :d"
        )
        session.execute(others, {"d": database.dsn.split("/")[3].split("?")[0]})
    with pytest.raises(Unavailable):
        store.wait_for_change(LONG_S)
    store.wait_for_change(LONG_S)  # connected again, and says so at once
    queued_job(database)
    began = time.monotonic()
    store.wait_for_change(LONG_S)
    assert time.monotonic() - began < LONG_S
    store.close()


@settings(
    max_examples=4,
    deadline=None,
    phases=GENERATE_ONLY,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 3), min_size=1, max_size=3)), min_size=10, max_size=30)
)
def test_no_slot_is_ever_held_twice(
    database: Database, store: SqlSchedulerStore, plan: list[tuple[int, set[int]]]
) -> None:
    """Threads grant, lose and release jobs over each other; the ledger is checked after each of their transactions."""
    jobs = [queued_job(database, fruitless_attempts=-100) for _ in range(6)]
    epoch = store.take_epoch()
    failures: list[str] = []

    def turn(which: int, slots: set[int]) -> None:
        with database.platform() as session:
            attempt, now = session.execute(select(Job.attempt, Job.state).where(Job.id == jobs[which])).one()
        if now == S.QUEUED:
            grant(store, epoch, jobs[which], Placement({"n1": tuple(sorted(slots))}), attempt)
        elif store.mark_recovering(epoch, jobs[which], attempt, "x"):
            store.release(epoch, [(jobs[which], attempt)])
        failures.extend(_contradictions(database))

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(turn, *step) for step in plan]:
            future.result()
    assert failures == []


def _contradictions(database: Database) -> list[str]:
    with database.snapshot() as session:
        leases = session.scalars(select(Lease).where(Lease.released_at.is_(None))).all()
        rows = {(slot.node, slot.slot) for slot in session.scalars(select(LeaseSlot))}
    taken = [(lease.node, slot) for lease in leases for slot in lease.slots]
    found = [f"held twice: {taken}"] if len(set(taken)) != len(taken) else []
    return found + ([f"{rows} differs from {taken}"] if rows != set(taken) else [])


def test_a_new_scheduler_waits_for_the_write_that_its_predecessor_has_begun(
    database: Database, store: SqlSchedulerStore, epoch: int
) -> None:
    with ThreadPoolExecutor(1) as pool:
        with database.platform() as writing:
            _check_epoch(writing, epoch)
            taking = pool.submit(store.take_epoch)
            with pytest.raises(TimeoutError):
                taking.result(timeout=0.3)
        assert taking.result(timeout=LONG_S) == epoch + 1


def test_a_tenants_slot_limit_reaches_the_scheduler(database: Database, store: SqlSchedulerStore) -> None:
    with database.platform() as session:
        make_tenant(session, "bounded", max_slots=3)
        make_tenant(session, "free")
    shares = store.rows().shares
    assert shares is not None
    assert shares.tenants == {"bounded": TenantShare("bounded", max_slots=3)}


def test_base_models_for_every_node_are_those_that_are_ready(database: Database) -> None:
    with database.platform() as session:
        for name, status in (("one", "ready"), ("two", "ready"), ("three", "preparing")):
            make_base_model(session, name, status=status, sha256=name[0] * 64)
    store = SqlSchedulerStore(database)
    assert [model.prefix for model in store.base_models(["two", "three", "never"])] == ["base-models/two"]
    assert {"base-models/one", "base-models/two"} <= {model.prefix for model in store.base_models(["*"])}
    assert "base-models/three" not in {model.prefix for model in store.base_models(["*"])}
