"""The process tree: commands in every state, sudden death on either side, and what is left of it: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_child import Child, Zygote, make_config, numbers, tree_of
from builders_llama import capital_rows, write_rows
from waiting import until

from trainers.config import TrainConfig

pytestmark = pytest.mark.integration
LONG = 100_000


@pytest.fixture
def long_run(tiny_llama: Path, capitals: Path, tmp_path: Path) -> TrainConfig:
    """Would train for hours; no checkpoint unless told."""
    return make_config(tiny_llama, capitals, tmp_path / "out", max_steps=LONG, checkpoint_every_s=1e9)


def running(child: Child, config: TrainConfig) -> Child:
    child.start(config)
    child.until("step")
    return child


def is_gone(pids: list[int]) -> bool:
    return not any(tree_of(pid) for pid in pids)


def test_hello_names_the_versions(child: Child) -> None:
    hello = child.messages[0]
    assert hello["pid"] == child.pid and hello["python"].startswith("3.") and hello["torch"] and hello["peft"]


def test_every_command_is_answered_before_the_start(child: Child) -> None:
    for id, command in enumerate(["ping", "checkpoint", "park", "resume"]):
        ack = child.command(command, id)
        assert (ack["id"], ack["command"], ack["state"]) == (id, command, "starting")


def test_a_stop_before_the_start_holds(child: Child, long_run: TrainConfig) -> None:
    assert child.command("stop")["state"] == "finished"
    child.start(long_run)
    assert child.command("ping", 2)["state"] == "finished"


def test_a_command_while_loading_is_answered(child: Child, long_run: TrainConfig) -> None:
    child.start(long_run)
    assert child.command("ping")["state"] == "loading"
    child.channel.send("command", id=2, command="checkpoint")
    assert child.until("ack")["id"] == 2


def test_a_stop_while_loading_ends_the_ranks_at_once(child: Child, long_run: TrainConfig) -> None:
    child.start(long_run)
    ack = child.command("stop")
    assert ack["state"] == "finished" and "step" not in child.types
    until(lambda: tree_of(child.pid) == [child.pid])
    assert "failed" not in child.types


def test_a_checkpoint_on_command_is_of_the_step_that_is_done(child: Child, long_run: TrainConfig) -> None:
    running(child, long_run)
    ack = child.command("checkpoint")
    written = next(message for message in child.messages if message["type"] == "checkpoint")
    assert ack["state"] == "training" and ack["step"] == written["step"] == child.steps[-1]["step"]
    folder = Path(written["path"])
    assert folder.name == f"step-{written['step']:08d}"
    assert sorted(written["sha256"]) == sorted(file.name for file in folder.iterdir())
    assert written["bytes"] == sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_leaves_a_checkpoint_that_goes_on_as_if_nothing_was(
    world_size: int, child: Child, second_child: Child, long_run: TrainConfig, tmp_path: Path
) -> None:
    config = replace(long_run, world_size=world_size)
    running(child, config)
    ack = child.command("stop")
    assert ack["state"] == "finished" and child.types[-2:] == ["checkpoint", "ack"]
    written, stopped_at = child.messages[-2], child.steps[-1]["step"]
    assert written["step"] == ack["step"] == stopped_at
    assert child.command("ping", 2)["state"] == "finished"
    resumed = replace(config, output_dir=str(tmp_path / "2"), resume_from=written["path"])
    running(second_child, resumed)
    assert second_child.steps[0]["step"] == stopped_at + 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_parked_means_no_step_until_resumed_and_changes_no_number(
    world_size: int, child: Child, second_child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", max_steps=80, world_size=world_size, checkpoint_every_s=1e9
    )
    running(child, config)
    parked = child.command("park", 1)
    assert parked["state"] == "parked" and parked["step"] == child.steps[-1]["step"]
    assert child.command("ping", 2)["state"] == "parked"
    assert child.command("checkpoint", 3)["state"] == "parked" and child.types[-2] == "checkpoint"
    assert child.command("park", 4)["state"] == "parked"
    assert child.steps[-1]["step"] == parked["step"]
    assert child.command("resume", 5)["state"] == "training"
    child.until("finished")
    assert numbers(child.steps) == numbers(second_child.run(replace(config, output_dir=str(tmp_path / "2"))))


def test_a_parked_run_can_be_stopped(child: Child, long_run: TrainConfig) -> None:
    running(child, long_run)
    child.command("park")
    ack = child.command("stop", 2)
    assert ack["state"] == "finished" and child.types[-2] == "checkpoint"


def test_resume_without_park_is_answered(child: Child, long_run: TrainConfig) -> None:
    assert running(child, long_run).command("resume")["state"] == "training"


def test_commands_while_evaluating(child: Child, long_run: TrainConfig, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "many.jsonl", capital_rows(2000))
    child.start(replace(long_run, validation_file=str(rows), exact_match_rows=2000))
    child.until("ready")
    until(lambda: child.command("ping", 1)["state"] == "evaluating")  # `ready` is told a moment before
    assert child.command("checkpoint", 2)["state"] == "evaluating" and "checkpoint" not in child.types
    assert child.command("park", 3)["state"] == "parked"
    assert child.command("resume", 4)["state"] == "evaluating"
    assert child.command("stop", 5)["state"] == "finished"
    assert "evaluated" not in child.types and child.steps == []


def test_commands_are_answered_to_the_end_and_after(
    child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    child.start(make_config(tiny_llama, capitals, tmp_path, max_steps=3))
    child.until("ready")
    for id in range(200):
        child.channel.send("command", id=id, command=["ping", "checkpoint", "resume"][id % 3])
    answered = [child.until("ack") for _ in range(200)]
    assert sorted(ack["id"] for ack in answered) == list(range(200))
    if "finished" not in child.types:
        child.until("finished")
    for id, command in enumerate(["ping", "checkpoint", "park", "resume", "stop"], 1000):
        assert child.command(command, id)["state"] in ("finishing", "finished")
    until(lambda: tree_of(child.pid) == [child.pid])
    assert child.command("park", 2000)["state"] == "finished"


@pytest.mark.parametrize("world_size", [1, 2])
def test_end_of_file_ends_the_whole_tree(world_size: int, child: Child, long_run: TrainConfig) -> None:
    running(child, replace(long_run, world_size=world_size))
    pids = tree_of(child.pid)
    assert len(pids) == 1 + world_size
    child.channel.close()
    until(lambda: is_gone(pids))


def test_end_of_file_ends_a_parked_tree(child: Child, long_run: TrainConfig) -> None:
    running(child, replace(long_run, world_size=2)).command("park")
    pids = tree_of(child.pid)
    assert len(pids) == 3
    child.channel.close()
    until(lambda: is_gone(pids))


def test_a_killed_launcher_takes_its_ranks_along_and_the_run_goes_on_elsewhere(
    child: Child, second_child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=40)
    child.start(config)
    while child.until("checkpoint")["step"] < 3:
        pass
    pids = tree_of(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: is_gone(pids))
    with pytest.raises(AssertionError, match="end of file"):
        child.until("finished")
    last = [message for message in child.messages if message["type"] == "checkpoint"][-1]
    again = numbers(second_child.run(replace(config, output_dir=str(tmp_path / "2"), resume_from=last["path"])))
    seen = {step["step"]: step["loss"] for step in child.steps}
    assert again[0][0] == last["step"] + 1 and again[-1][0] == 40
    assert all(seen[step] == loss for step, loss, *_ in again if step in seen)


def test_a_killed_rank_is_a_failure_that_the_user_need_not_fix(child: Child, long_run: TrainConfig) -> None:
    running(child, replace(long_run, world_size=2))
    _, first, second = tree_of(child.pid)
    os.kill(max(first, second), signal.SIGKILL)
    failed = child.until("failed")
    assert failed["code"] in ("rank_lost", "training_error") and failed["fixable_by"] == "operator"
    assert child.command("checkpoint")["state"] == "failed"
    until(lambda: tree_of(child.pid) == [child.pid])


def test_a_failure_is_told_once_and_the_launcher_stays_to_answer(
    child: Child, long_run: TrainConfig, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "bad.jsonl", [{"text": ""}])
    child.start(replace(long_run, train_file=str(rows), world_size=2))
    failed = child.until("failed")
    assert failed["code"] == "no_loss_tokens" and failed["fixable_by"] == "user" and failed["hint"]
    assert child.command("stop")["state"] == "failed"
    assert child.types.count("failed") == 1


def test_a_configuration_that_is_not_understood(child: Child) -> None:
    child.channel.send("start", config={"base_model": "x", "speed": 9})
    assert child.until("failed")["code"] == "config_invalid"


def test_saved_checkpoints_make_older_ones_go(child: Child, long_run: TrainConfig) -> None:
    running(child, replace(long_run, keep_checkpoints=1))
    folder = Path(long_run.output_dir) / "checkpoints"
    for id in range(3):
        child.command("checkpoint", id)
        child.until("step")
    steps = sorted(path.name for path in folder.iterdir())
    assert len(steps) == 3
    child.channel.send("saved", step=int(steps[1][5:]))
    until(lambda: sorted(path.name for path in folder.iterdir()) == steps[1:])


WITHOUT_THE_HOUSE = """
import importlib.machinery, sys
HOUSE = {"app", "cluster", "runtime_envs", "ray", "fastapi", "starlette", "sqlalchemy", "psycopg", "pyarrow", "typer", "rattler"}
sys.meta_path[:] = [one for one in sys.meta_path if getattr(one, "__name__", "") != "_EditableFinder"]
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    if name.split(".")[0] not in HOUSE and not name.startswith("trainers.run"):
        return find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
"""A `sitecustomize.py`: an environment where none of it is installed."""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment variables of an interpreter without Ray and the rest of the platform; torchrun's processes inherit it."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(WITHOUT_THE_HOUSE)
    path = f"{tmp_path / 'bare'}:{Path(__file__).parents[3]}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}


def lines_of(command: list[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_bare_environment_has_no_ray(bare: dict[str, str]) -> None:
    program = "import json, ray"
    done = subprocess.run([sys.executable, "-c", program], env=bare, capture_output=True, text=True, check=False)
    assert "No module named 'ray'" in done.stderr


def test_main_trains_without_a_cluster(
    child: Child, bare: dict[str, str], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=3)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    lines = lines_of([sys.executable, "-m", "trainers.child.main", str(tmp_path / "config.json")], bare)
    assert lines[0]["type"] == "hello" and lines[-1]["type"] == "finished"
    steps = [line for line in lines if line["type"] == "step"]
    assert numbers(steps) == numbers(child.run(replace(config, output_dir=str(tmp_path / "2"))))


@pytest.mark.integration  # fresh interpreters that import torch and transformers
def test_main_is_a_rank_under_torchrun(
    child: Child, bare: dict[str, str], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2, world_size=2)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    lines = lines_of([*torchrun, "trainers.child.main", str(tmp_path / "config.json")], bare)
    assert lines[-1]["type"] == "finished"
    steps = [line for line in lines if line["type"] == "step"]
    assert numbers(steps) == numbers(child.run(replace(config, output_dir=str(tmp_path / "2"))))


def test_the_child_has_no_other_house_code_loaded(_zygote: Zygote) -> None:
    program = (
        "import sys, trainers.child.launcher as l; l._versions();"
        "print([m for m in sys.modules if m.split('.')[0] in ('ray', 'app', 'cluster', 'runtime_envs')"
        " or m.startswith('trainers.run')])"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
