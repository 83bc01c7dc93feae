"""What a driver reads and writes, and that a stale one changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from builders_db import grant, granted_job, make_dataset, make_node, queued_job
from sqlalchemy import func, select, update

from app.db.job_store import SqlJobStore
from app.db.models import BaseModel, Checkpoint, Event, Job, Lease, Model, ModelVersion, Step
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database
from app.db.transitions import ask, resume
from cluster.core.job import JobState, Placement, Wish
from cluster.errors import Conflict, Fenced, InvalidRequest
from trainers.run.ports import Assignment, Heartbeat, StepRow

S = JobState


@pytest.fixture
def scheduler(database: Database) -> SqlSchedulerStore:
    return SqlSchedulerStore(database)


@pytest.fixture
def store(database: Database) -> SqlJobStore:
    return SqlJobStore(database)


@pytest.fixture
def epoch(scheduler: SqlSchedulerStore) -> int:
    return scheduler.take_epoch()


@pytest.fixture
def job_id(database: Database, scheduler: SqlSchedulerStore, epoch: int) -> str:
    """Preparing, attempt 1."""
    return granted_job(database, scheduler, epoch)


def step(number: int, loss: float = 1.0) -> StepRow:
    return StepRow(number, number / 10, loss, 1e-3, 0.5, 100, 0.25)


def row(database: Database, job_id: str) -> Job:
    with database.platform() as session:
        job = session.get(Job, job_id)
        assert job is not None
        return job


def events(database: Database, job_id: str) -> list[tuple[str, Any]]:
    with database.platform() as session:
        found = session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)).all()
        return [(event.type, event.data.get("to")) for event in found]


def test_a_job_from_grant_to_model(database: Database, store: SqlJobStore, job_id: str) -> None:
    assert store.move(job_id, 1, S.RUNNING, reason="first step")
    store.record_steps(job_id, 1, [step(1), step(2)])
    store.commit_checkpoint(job_id, 1, 2, "ck/2", {"a": "0"}, {"loss": 1.0})
    assert store.move(job_id, 1, S.ARCHIVING, reason="trained")
    assert store.finish(job_id, 1, "models/x", {"a": "0"}, {"loss": 1.0}, {"base": "tiny"}) == "tuned@1"
    job = row(database, job_id)
    assert (job.state, job.fine_tuned_model) == ("succeeded", "tuned@1")
    assert job.started_at is not None and job.finished_at is not None and job.started_at <= job.finished_at
    assert job.actual is not None and (job.actual["tokens"], job.actual["steps"]) == (200, 2)
    assert events(database, job_id) == [
        ("state", "preparing"),
        ("state", "running"),
        ("metrics", None),
        ("checkpoint", None),
        ("state", "archiving"),
        ("state", "succeeded"),
    ]


def test_finishing_again_gives_the_same_answer_and_registers_nothing(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, job_id: str
) -> None:
    store.move(job_id, 1, S.RUNNING, reason="")
    store.move(job_id, 1, S.ARCHIVING, reason="")
    first = store.finish(job_id, 1, "p", {}, {}, {})
    scheduler.release(epoch, [(job_id, 1)])
    assert store.finish(job_id, 1, "p", {}, {}, {}) == first
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(ModelVersion)) == 1


def test_a_second_job_under_the_same_name_makes_the_next_version(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int
) -> None:
    names = []
    for slot in (0, 1):
        job_id = granted_job(database, scheduler, epoch, slot)
        store.move(job_id, 1, S.RUNNING, reason="")
        store.move(job_id, 1, S.ARCHIVING, reason="")
        names.append(store.finish(job_id, 1, "p", {}, {}, {}))
    assert names == ["tuned@1", "tuned@2"]
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 1


def test_only_an_archiving_job_finishes(store: SqlJobStore, job_id: str) -> None:
    with pytest.raises(Conflict):
        store.finish(job_id, 1, "p", {}, {}, {})


def test_a_move_that_the_table_does_not_have_is_refused(database: Database, store: SqlJobStore, job_id: str) -> None:
    assert not store.move(job_id, 1, S.SUCCEEDED, reason="")
    assert row(database, job_id).state == "preparing"


def test_a_move_asked_again_is_written_once(database: Database, store: SqlJobStore, job_id: str) -> None:
    assert store.move(job_id, 1, S.RUNNING, reason="x")
    assert store.move(job_id, 1, S.RUNNING, reason="x")
    assert events(database, job_id) == [("state", "preparing"), ("state", "running")]


def test_a_failure_is_kept_with_its_hint(database: Database, store: SqlJobStore, job_id: str) -> None:
    error: dict[str, str | None] = {"code": "loss_not_finite", "message": "NaN at step 3", "hint": "Lower the lr."}
    assert store.move(job_id, 1, S.FAILED, reason="child failed", error=error)
    job = row(database, job_id)
    assert job.error == error and job.finished_at is not None
    store.event(job_id, 1, "log", "last words")  # the lease is still open


WRITES: list[Callable[[SqlJobStore, str], object]] = [
    lambda store, job: store.move(job, 1, S.FAILED, reason=""),
    lambda store, job: store.event(job, 1, "log", "x"),
    lambda store, job: store.record_steps(job, 1, [step(1)]),
    lambda store, job: store.commit_checkpoint(job, 1, 1, "p", {}, {}),
    lambda store, job: store.finish(job, 1, "p", {}, {}, {}),
    lambda store, job: store.assignment(job, 1),
]


@pytest.mark.parametrize("write", WRITES)
def test_after_its_release_an_attempt_changes_nothing(
    database: Database,
    store: SqlJobStore,
    scheduler: SqlSchedulerStore,
    epoch: int,
    job_id: str,
    write: Callable[[SqlJobStore, str], object],
) -> None:
    scheduler.mark_recovering(epoch, job_id, 1, "lost")
    scheduler.release(epoch, [(job_id, 1)])
    before = row(database, job_id)
    assert before.state == "queued"  # from where the table would allow much
    with pytest.raises(Fenced):
        write(store, job_id)
    assert grant(scheduler, epoch, job_id, Placement({"n1": (0,)}), 1) == 2
    with pytest.raises(Fenced):
        write(store, job_id)
    after = row(database, job_id)
    assert (after.state, after.attempt, after.last_seq) == ("preparing", 2, before.last_seq + 1)
    assert store.heartbeat(job_id, 1, 30.0).fenced and not store.heartbeat(job_id, 2, 30.0).fenced


def test_an_attempt_marked_as_recovering_is_fenced_before_its_release(
    store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, job_id: str
) -> None:
    assert scheduler.mark_recovering(epoch, job_id, 1, "no progress")
    assert store.heartbeat(job_id, 1, 30.0).fenced
    with pytest.raises(Fenced):
        store.move(job_id, 1, S.PAUSED, reason="")  # what the table would allow
    with pytest.raises(Fenced):
        store.record_steps(job_id, 1, [step(1)])


def test_a_heartbeat_renews_the_lease_and_tells_the_wish(database: Database, store: SqlJobStore, job_id: str) -> None:
    with database.platform() as session:
        session.execute(update(Lease).values(expires_at=func.now()))
    assert store.heartbeat(job_id, 1, 30.0) == Heartbeat(Wish.RUN, fenced=False)
    with database.platform() as session:
        left = session.scalar(select(func.extract("epoch", Lease.expires_at - func.now())))
        assert left is not None and 25 < left < 31
        job = session.get(Job, job_id)
        assert job is not None
        ask(session, job, Wish.CANCEL)
    assert store.heartbeat(job_id, 1, 30.0).wish is Wish.CANCEL


def test_a_step_computed_again_takes_the_place_of_its_row(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, job_id: str
) -> None:
    store.record_steps(job_id, 1, [step(1), step(2, loss=9.0), step(2, loss=8.0)])
    scheduler.mark_recovering(epoch, job_id, 1, "lost")
    scheduler.release(epoch, [(job_id, 1)])
    grant(scheduler, epoch, job_id, Placement({"n1": (0,)}), 1)
    store.record_steps(job_id, 2, [step(2, loss=7.0), step(3)])
    with database.platform() as session:
        rows = session.execute(select(Step.step, Step.attempt, Step.loss).order_by(Step.step)).all()
    assert [tuple(found) for found in rows] == [(1, 1, 1.0), (2, 2, 7.0), (3, 2, 1.0)]


def test_a_checkpoint_is_committed_once(database: Database, store: SqlJobStore, job_id: str) -> None:
    for _ in range(2):
        store.commit_checkpoint(job_id, 1, 5, "ck/5", {"a": "0"}, {})
    with database.platform() as session:
        assert session.scalar(select(func.count()).select_from(Checkpoint)) == 1
    assert events(database, job_id).count(("checkpoint", None)) == 1


def test_an_attempt_knows_that_an_earlier_one_ran_out_of_memory(
    store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, job_id: str
) -> None:
    assert not store.assignment(job_id, 1).short_of_memory
    error: dict[str, str | None] = {"code": "memory_limit_exceeded", "message": "full"}
    store.move(job_id, 1, S.RECOVERING, reason="once more", error=error)
    scheduler.release(epoch, [(job_id, 1)])
    assert grant(scheduler, epoch, job_id, Placement({"n1": (0,)}), 1) == 2
    assert store.assignment(job_id, 2).short_of_memory


def test_the_assignment_has_all_that_an_attempt_needs(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int
) -> None:
    with database.platform() as session:
        make_node(session, "n1", kind="A100")
        validation = make_dataset(session, name="held-out", object_key="v.jsonl", sha256="1" * 64)
    fields = {
        "validation_dataset_id": validation.id,
        "resource_config": {"mem_limit_gb": 3},
        "hyperparams": {"lr": 0.5, "epochs": 2},
    }
    job_id = queued_job(database, **fields)
    grant(scheduler, epoch, job_id, Placement({"n1": (1, 0)}))
    store.commit_checkpoint(job_id, 1, 4, "ck/4", {"w": "2"}, {})
    store.commit_checkpoint(job_id, 1, 10, "ck/10", {"w": "3"}, {})
    got: Assignment = store.assignment(job_id, 1)
    assert (got.tenant, got.kind, got.placement) == ("acme", "A100", Placement({"n1": (1, 0)}))
    assert (got.hyperparams.lr, got.hyperparams.epochs, got.memory_limit_gb) == (0.5, 2, 3)
    assert (got.validation_key, got.validation_sha256) == ("v.jsonl", "1" * 64)
    assert got.checkpoint is not None and (got.checkpoint.step, got.checkpoint.prefix) == (10, "ck/10")
    assert got.best is None and got.outputs == ()
    store.commit_checkpoint(job_id, 1, 12, "ck/12", {"w": "4"}, {"best_step": 4})
    best = store.assignment(job_id, 1).best
    assert best is not None and (best.step, best.prefix, best.files) == (4, "ck/4", {"w": "2"})
    told = ((14, 14), (16, 11), (18, "4"), (20, None))  # itself, one that was not kept, and what a child may say
    for step, said in told:
        store.commit_checkpoint(job_id, 1, step, f"ck/{step}", {"w": "4"}, {"best_step": said})
        assert store.assignment(job_id, 1).best is None
    assert (got.base_model_name, got.base_model_prefix, got.adapter_prefix) == ("tiny", "base-models/tiny", None)


@pytest.mark.parametrize(("kind", "base", "adapter"), [("adapter", "base-models/tiny", "p"), ("model", "p", None)])
def test_training_goes_on_from_a_tuned_version(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, kind: str, base: str, adapter: str
) -> None:
    first = granted_job(database, scheduler, epoch, 0)
    store.move(first, 1, S.RUNNING, reason="")
    store.move(first, 1, S.ARCHIVING, reason="")
    store.finish(first, 1, "p", {"w": "1"}, {}, {})
    with database.platform() as session:
        session.execute(update(ModelVersion).values(kind=kind))
        version = session.scalar(select(ModelVersion.id))
    second = queued_job(database, parent_version_id=version)
    grant(scheduler, epoch, second, Placement({"n1": (1,)}))
    got = store.assignment(second, 1)
    assert (got.base_model_prefix, got.adapter_prefix) == (base, adapter)


def test_a_base_model_that_is_gone_is_said_so(database: Database, store: SqlJobStore, job_id: str) -> None:
    with database.platform() as session:
        session.execute(update(BaseModel).values(prefix=None, status="failed"))
    with pytest.raises(Conflict, match="tiny is failed"):
        store.assignment(job_id, 1)


def test_the_running_time_is_added_up_over_attempts(
    database: Database, store: SqlJobStore, scheduler: SqlSchedulerStore, epoch: int, job_id: str
) -> None:
    hour_ago = func.now() - func.make_interval(0, 0, 0, 0, 1)
    for attempt in (1, 2):
        store.move(job_id, attempt, S.RUNNING, reason="")
        with database.platform() as session:
            session.execute(update(Job).values(state_since=hour_ago))
        store.move(job_id, attempt, S.RECOVERING, reason="lost")
        scheduler.release(epoch, [(job_id, attempt)])
        grant(scheduler, epoch, job_id, Placement({"n1": (0,)}), attempt)
    assert 7190 < store.assignment(job_id, 3).ran_s < 7300


@pytest.mark.parametrize(
    ("asked", "ends"),
    [([Wish.PAUSE], "paused"), ([Wish.PAUSE, Wish.CANCEL], "cancelled"), ([Wish.PAUSE, Wish.RUN], "queued")],
)
def test_the_last_wish_counts_when_a_pause_is_reached(
    database: Database, scheduler: SqlSchedulerStore, store: SqlJobStore, epoch: int, job_id: str, asked: Any, ends: str
) -> None:
    store.move(job_id, 1, S.RUNNING, reason="x")
    with database.platform() as session:
        job = session.get_one(Job, job_id)
        for wish in asked:
            resume(session, job) if wish is Wish.RUN else ask(session, job, wish)
    assert store.move(job_id, 1, S.PAUSED, reason="paused on request")
    assert (row(database, job_id).state, row(database, job_id).wish) == (ends, "run")
    assert scheduler.rows().waiting == []  # its slots are not free yet
    scheduler.release(epoch, [(job_id, 1)])
    assert [job.id for job in scheduler.rows().waiting] == ([job_id] if ends == "queued" else [])


def test_steps_and_tokens_of_more_than_31_bits(store: SqlJobStore, database: Database, job_id: str) -> None:
    most = 2**63 - 1
    store.record_steps(job_id, 1, [StepRow(3 * 10**9, 0.0, 1.0, 1e-3, 0.5, most, 0.25)])
    store.commit_checkpoint(job_id, 1, most, "p", {}, {})
    with database.platform() as session:
        assert session.execute(select(Step.step, Step.tokens)).one() == (3 * 10**9, most)
        assert session.scalar(select(Checkpoint.step)) == most
    with pytest.raises(InvalidRequest, match="cannot be stored"):
        store.record_steps(job_id, 1, [StepRow(1, 0.0, 1.0, 1e-3, 0.5, most + 1, 0.25)])


@pytest.mark.parametrize(("type", "counts"), [("stage", True), ("evaluated", True), ("log", False)])
def test_a_stage_left_behind_is_progress_and_chatter_is_not(
    database: Database, store: SqlJobStore, job_id: str, type: str, counts: bool
) -> None:
    before = row(database, job_id).progress_at
    store.event(job_id, 1, type, "environment: 700 s")
    assert (row(database, job_id).progress_at > before) == counts
