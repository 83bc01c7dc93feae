"""A driver with a real worker and a real child process that speaks the protocol; only Ray and the database are not there."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scripted_child_names as does
from fakes_driver import JOB, World, make_world
from waiting import PATIENCE_S, until

from cluster.core.job import JobState, Placement, Wish
from cluster.errors import EnvironmentError_, InvalidRequest, Unavailable
from cluster.processes import running_attempts
from trainers.config import Hyperparams
from trainers.run.conversation import Intent, outcome_of
from trainers.run.ports import LastCheckpoint, Script
from trainers.run.preparing import attempt_files, hyperparams_of, parts_of, prepare, train_config

SCRIPT = Path(__file__).with_name("scripted_child.py")
STEPS = list(range(1, 7))


def world(root: Path, seed: int = does.GOOD, **changes: Any) -> World:
    return make_world(root, SCRIPT, hyperparams=Hyperparams(seed=seed), **changes)


def run(made: World, meanwhile: Callable[[], None] = lambda: None) -> World:
    """Runs the driver to its end; no process of the attempt may be left."""
    thread = threading.Thread(target=made.driver.run)
    thread.start()
    meanwhile()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    until(lambda: (JOB, 1) not in running_attempts())
    return made


def stored_of(made: World) -> list[int]:
    """Each step's checkpoint is followed by the next one's at once: those that were overtaken are left out."""
    steps = [checkpoint.step for checkpoint in made.store.checkpoints]
    assert steps == sorted(steps)
    return steps


def log_of(made: World) -> str:
    keys = made.storage.keys(f"tenants/t1/jobs/{JOB}/logs/a1/r0")
    return b"".join(made.storage.read_bytes(key) for key in keys).decode()


def test_a_job_goes_from_its_assignment_to_a_stored_model(tmp_path: Path) -> None:
    made = run(world(tmp_path))
    store = made.store
    assert [state for state, _ in store.moves] == [JobState.RUNNING, JobState.ARCHIVING]
    assert store.state is JobState.SUCCEEDED
    assert list(store.steps) == STEPS
    assert stored_of(made)[-1] == STEPS[-1]
    assert store.result is not None
    assert store.result["prefix"] == f"tenants/t1/models/{JOB}/a1"
    assert made.storage.read_bytes(f"tenants/t1/models/{JOB}/a1/adapter_model.safetensors") == b"adapter"
    assert store.result["lineage"]["base_model"] == "m"
    assert store.result["lineage"]["hyperparams"]["batch_size"] == 8
    assert made.agent.cleared == [(JOB, 1)]
    assert made.gang.ended == 1


def test_each_stage_leaves_an_event_with_its_seconds(tmp_path: Path) -> None:
    store = run(world(tmp_path)).store
    before = ["environment", "model", "staging", "worker_start", "imports", "load"]
    assert store.stages() == [*before, "evaluation_before", "first_step", "archiving"]
    assert all(data["seconds"] >= 0 for type, _, data in store.events if type == "stage")


def test_samples_with_nul_characters_reach_the_database_without(tmp_path: Path) -> None:
    events = run(world(tmp_path)).store.events
    samples = next(data["samples"] for type, _, data in events if type == "evaluated")
    assert samples == [{"answer": "nul \ufffd"}]


def test_the_child_sees_nothing_of_the_workers_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN_PATH", "HELIOSTAT_DATABASE__DSN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    printed = log_of(run(world(tmp_path)))
    names = printed.split("variables: ")[1].strip().split(",")
    assert [name for name in names if name.startswith(("RAY_", "AWS_"))] == []
    assert [name for name in names if name.startswith("HELIOSTAT_")] == [
        "HELIOSTAT_ATTEMPT",
        "HELIOSTAT_CONTROL_FD",
    ]
    assert "RAYON_NUM_THREADS" in names and "TOKENIZERS_PARALLELISM" not in names  # whose script forks, says so itself


def test_an_attempt_continues_from_the_checkpoint_of_another(tmp_path: Path) -> None:
    made = world(tmp_path)
    files = {"step": made.storage.put_bytes("old/step", b"4")}
    object.__setattr__(made.store.given, "checkpoint", LastCheckpoint(4, 0, "old", files))
    assert list(run(made).store.steps) == [5, 6]


def test_a_checkpoint_that_is_kept_no_longer_leaves_the_storage(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.store.keeps = 1
    assert len(run(made).store.checkpoints) > 1
    *gone, last = [checkpoint.prefix for checkpoint in made.store.checkpoints]
    assert made.storage.keys(last) and not any(made.storage.keys(f"{prefix}/") for prefix in gone)


def test_of_a_checkpoint_to_begin_with_the_weights_are_staged_only(tmp_path: Path) -> None:
    made = world(tmp_path)
    files = {
        name: made.storage.put_bytes(f"ck/{name}", b"x")
        for name in ("adapter_config.json", "optimizer-00001.safetensors")
    }
    made.storage.put_bytes("ck/manifest.json", json.dumps(files).encode())
    object.__setattr__(made.store.given, "adapter_prefix", "ck")
    assert [name for name in attempt_files(made.store.given, made.storage) if name.startswith("adapter")] == [
        "adapter/adapter_config.json"
    ]


def test_the_best_checkpoint_so_far_is_staged_beside_the_last(tmp_path: Path) -> None:
    made = world(tmp_path, outputs=("merged",))
    files = {name: made.storage.put_bytes(f"best/{name}", b"x") for name in ("adapter.bin", "state.json", "random.pt")}
    object.__setattr__(made.store.given, "best", LastCheckpoint(2, 1, "best", files))
    staged = attempt_files(made.store.given, made.storage)
    assert [name for name in staged if name.startswith("best")] == ["best/adapter.bin"]
    config = train_config(
        made.store.given, parts_of(made.store.given)[0], made.driver._settings, "base", "/node/jobs/j/a1", 1
    )
    assert config.best_checkpoint == "/node/jobs/j/a1/best" and config.outputs == ["merged", "curves", "tensorboard"]


def test_threads_are_counted_on_the_node_that_trains(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.agent.cpus = 5 + (os.cpu_count() or 1)  # its only slot has all of them
    task = prepare(made.store.given, made.agent, made.driver._settings, lambda stage, seconds: None)["n1"]
    assert task.threads == task.config["threads_per_slot"] == made.agent.cpus


@pytest.mark.parametrize(("how", "name"), [(does.DIES, "SIGKILL"), (does.DIES_NAMELESS, "signal 40")])
def test_a_killed_child_is_recovered_from(tmp_path: Path, how: int, name: str) -> None:
    store = run(world(tmp_path, how)).store
    assert store.state is JobState.RECOVERING
    assert name in store.moves[-1][1]
    assert store.error is not None and store.error["code"] == "child_killed" and "memory" in str(store.error["hint"])
    assert list(store.steps) == [1, 2, 3]


def test_what_the_user_can_mend_fails_the_job_with_its_hint(tmp_path: Path) -> None:
    store = run(world(tmp_path, does.FAILS)).store
    assert store.state is JobState.FAILED
    assert store.error == {
        "code": "loss_not_finite",
        "message": "NaN",
        "param": None,
        "hint": "lower lr",
        "fixable_by": "user",
    }


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 1),
        ({"placement": Placement({"n1": (0, 1)})}, 1),
        ({"hyperparams": {"micro_batch_size": 8}}, 4),
        ({"hyperparams": {"micro_batch_size": 8}, "placement": Placement({"n1": (0, 1)})}, 2),
        ({"hyperparams": {"micro_batch_size": 3}}, 1),
        ({"hyperparams": {"micro_batch_size": 1}}, None),
        ({"short_of_memory": True}, None),
        ({"script": Script(["train.py"], {})}, None),
    ],
)
def test_who_runs_out_of_memory_is_tried_once_more_with_fewer_rows(
    tmp_path: Path, changes: dict[str, Any], rows: int | None
) -> None:
    hyper = Hyperparams(seed=does.NO_MEMORY, **changes.pop("hyperparams", {}))
    made = make_world(tmp_path, SCRIPT, hyperparams=hyper)
    made.store.given = replace(made.store.given, **changes)
    run(made)
    state, reason = made.store.moves[-1]
    assert made.store.error is not None and made.store.error["code"] == "memory_limit_exceeded"
    if rows is None:
        assert state is JobState.FAILED
    else:
        assert state is JobState.RECOVERING and f"at most {rows} row(s)" in reason
        again = replace(made.store.given, short_of_memory=True)
        assert hyperparams_of(again) == replace(hyper, micro_batch_size=rows)
    assert hyperparams_of(made.store.given) == hyper or made.store.given.short_of_memory


@pytest.mark.parametrize(
    ("slots", "offload", "again"), [(1, "none", False), (2, "none", True), (1, "parameters", True)]
)
def test_one_rank_alone_has_halved_its_rows_itself(tmp_path: Path, slots: int, offload: str, again: bool) -> None:
    hyper = Hyperparams(seed=does.TORCH_NO_MEMORY, offload=offload)
    made = run(make_world(tmp_path, SCRIPT, hyperparams=hyper, placement=Placement({"n1": tuple(range(slots))})))
    assert made.store.state is (JobState.RECOVERING if again else JobState.FAILED)


@pytest.mark.parametrize("seed", [does.LINKS, does.LIES])
def test_hostile_files_are_not_taken_over(tmp_path: Path, seed: int) -> None:
    made = run(world(tmp_path, seed))
    assert made.store.state is JobState.FAILED
    assert made.store.error is not None
    assert made.store.error["code"] == "output_refused"
    assert made.store.checkpoints == []
    stored = [key for key in made.storage.keys(f"tenants/t1/jobs/{JOB}") if key.endswith("weights")]
    assert stored == []


def test_a_child_that_breaks_the_protocol_fails(tmp_path: Path) -> None:
    store = run(world(tmp_path, does.BABBLES)).store
    assert store.error is not None
    assert store.error["code"] == "protocol_violation"


def test_a_child_that_cannot_import_says_what_it_printed(tmp_path: Path) -> None:
    made = run(world(tmp_path, does.MUTE))
    assert made.store.error is not None
    assert made.store.error["code"] == "child_failed_to_start"
    assert "cannot import torch" in str(made.store.error["message"])
    assert "cannot import torch" in log_of(made)


def test_pause_writes_a_checkpoint_and_stops(tmp_path: Path) -> None:
    made = world(tmp_path, does.SLOW)

    def pause() -> None:
        until(lambda: made.store.state is JobState.RUNNING)
        made.store.wish = Wish.PAUSE

    run(made, pause)
    assert made.store.state is JobState.PAUSED
    assert [checkpoint.step for checkpoint in made.store.checkpoints] == [0]


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    made = world(tmp_path, does.HANGS, settings={"stop_grace_s": 0.2})
    made.store.wish = Wish.PAUSE
    made.agent.hold.clear()

    def pause_once_running() -> None:
        made.store.wish = Wish.RUN
        made.agent.hold.set()
        until(lambda: made.store.state is JobState.RUNNING)
        made.store.wish = Wish.PAUSE

    made.store.wish = Wish.RUN
    run(made, pause_once_running)
    assert made.store.state is JobState.PAUSED


def test_cancel_ends_a_hanging_child(tmp_path: Path) -> None:
    made = world(tmp_path, does.HANGS)

    def cancel() -> None:
        until(lambda: made.store.state is JobState.RUNNING)
        made.store.wish = Wish.CANCEL

    run(made, cancel)
    assert made.store.state is JobState.CANCELLED


def test_cancel_does_not_wait_for_a_slow_environment(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.agent.hold.clear()
    made.store.wish = Wish.CANCEL
    run(made, lambda: None)
    assert made.store.state is JobState.CANCELLED
    assert made.store.steps == {}
    made.gang.fails = "ended"
    made.agent.hold.set()


def test_a_worker_that_comes_up_when_all_is_over_gets_no_task(tmp_path: Path) -> None:
    made = run(world(tmp_path))
    assert made.store.state is JobState.SUCCEEDED
    with pytest.raises(RuntimeError, match="over"):
        made.driver.task("n1")


def test_too_long_a_run_fails_with_its_checkpoint_kept(tmp_path: Path) -> None:
    made = run(world(tmp_path, does.SLOW, max_runtime_s=10.0, ran_s=10.0))
    assert made.store.state is JobState.FAILED
    assert made.store.error is not None
    assert made.store.error["code"] == "max_runtime_reached"
    assert len(made.store.checkpoints) == 1


def test_training_goes_on_while_the_database_is_down(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.store.on_checkpoint = lambda: setattr(made.store, "down", True)
    made.storage.put_bytes("warm", b"")

    def back_later() -> None:
        until(lambda: made.store.down)
        until(lambda: made.storage.exists(f"tenants/t1/models/{JOB}/a1/manifest.json"))
        made.store.on_checkpoint = lambda: None
        made.store.down = False

    run(made, back_later)
    assert made.store.state is JobState.SUCCEEDED
    assert list(made.store.steps) == STEPS
    assert stored_of(made)[-1] == STEPS[-1]


@pytest.mark.parametrize("method", ["record_steps", "finish"])
def test_what_the_database_refuses_fails_the_job_by_its_name(tmp_path: Path, method: str) -> None:
    made = world(tmp_path)
    told = InvalidRequest("a value cannot be stored (integer out of range)", code="invalid_value", hint="smaller")
    made.store.refuses[method] = told
    run(made)
    assert made.store.state is JobState.FAILED
    assert made.store.error == told.as_dict() and made.store.moves[-1][1] == told.message


def test_what_it_refuses_after_the_training_fails_the_job_too(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.store.refuses["record_steps"] = Unavailable("not now")

    def back_later() -> None:
        until(lambda: made.storage.exists(f"tenants/t1/models/{JOB}/a1/manifest.json"))
        made.store.refuses["record_steps"] = InvalidRequest("a value cannot be stored", code="invalid_value")

    run(made, back_later)
    assert made.store.state is JobState.FAILED
    assert made.store.error is not None and made.store.error["code"] == "invalid_value"


def test_a_fenced_driver_ends_its_child_and_writes_nothing(tmp_path: Path) -> None:
    made = world(tmp_path, does.HANGS)
    seen: list[int] = []

    def take_over() -> None:
        until(lambda: made.store.state is JobState.RUNNING)
        with made.store.lock:
            made.store.attempt = 2
            seen.append(len(made.store.events))
        until(lambda: made.gang.ended)
        made.driver.relay("n1", [])  # the thread of the worker is not ended by a gang of threads
        made.driver._conversation.kill()

    run(made, take_over)
    assert made.store.state is JobState.RUNNING
    assert len(made.store.events) == seen[0]


def test_a_lost_worker_group_is_recovered_from(tmp_path: Path) -> None:
    made = world(tmp_path)
    made.gang.fails = "the node is gone"
    run(made)
    assert made.store.moves == [(JobState.RECOVERING, "the node is gone")]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (EnvironmentError_("numpy 1 and 2", code="environment_unsolvable"), JobState.FAILED),
        (Unavailable("the agent does not answer"), JobState.RECOVERING),
    ],
)
def test_trouble_while_preparing(tmp_path: Path, error: Exception, state: JobState) -> None:
    made = world(tmp_path)
    made.agent.fails = error
    run(made)
    assert made.store.state is state


def test_the_lease_is_renewed_all_along(tmp_path: Path) -> None:
    made = world(tmp_path, does.SLOW)

    def a_while() -> None:
        until(lambda: made.store.heartbeats >= 5)
        made.store.wish = Wish.CANCEL

    run(made, a_while)
    assert made.store.heartbeats >= 5


@pytest.mark.parametrize("intent", list(Intent))
def test_what_is_stopped_on_purpose_is_not_recovered_from(intent: Intent) -> None:
    assert outcome_of(intent).state in (JobState.CANCELLED, JobState.PAUSED, JobState.FAILED, JobState.SUSPENDED)
