"""Faults of the machine: each has a name, a hint and whose turn it is, and leaves the last good checkpoint, from which the run goes on
with the undisturbed numbers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Child, Recorder, make_config, numbers, tree_of
from builders_methods import checkpoint_of, train
from waiting import until

from trainers.child import session
from trainers.child.checkpoint import STATE_FILE, Store
from trainers.child.engine import PlainEngine
from trainers.child.failure import describe
from trainers.child.folders import total_bytes
from trainers.child.rank import run_rank
from trainers.child.world import World
from trainers.config import TrainConfig
from trainers.protocol import Message

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def failed(config: TrainConfig) -> tuple[Message, Recorder]:
    wire = Recorder()
    with pytest.raises(Exception):  # noqa: B017 - the libraries' own
        run_rank(config, 0, 1, wire)
    assert len(wire.of("failed")) == 1 and wire.of("finished") == []
    return wire.of("failed")[0], wire


def whole(output: Path) -> list[Path]:
    """The checkpoints that have a name."""
    found = sorted((output / "checkpoints").glob("step-*"))
    assert all((path / STATE_FILE).is_file() for path in found)
    return found


def test_a_disk_that_fills_up_with_checkpoints(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1")
    undisturbed = train(config)
    one = total_bytes(Path(checkpoint_of(undisturbed, 1)))
    with small_disk(tmp_path / "disk", int(3.5 * one)) as disk:
        failure, wire = failed(replace(config, output_dir=str(disk)))
        assert (failure["code"], failure["fixable_by"]) == ("disk_full", "operator") and "go" in failure["hint"]
        last = whole(disk)[-1]
        assert [message["step"] for message in wire.of("checkpoint")] == [1, 2, 3] and last.name == "step-00000003"
        resumed = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=str(last)))
    assert numbers(resumed.of("step")) == numbers(undisturbed.of("step"))[3:]


@pytest.mark.integration
def test_a_disk_without_room_for_the_model_keeps_the_last_checkpoint(
    tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", checkpoint_every_s=1e9, max_steps=2)
    undisturbed = train(config)
    room = total_bytes(Path(checkpoint_of(undisturbed, 2))) + total_bytes(tmp_path / "1" / "artifact") // 2
    with small_disk(tmp_path / "disk", room) as disk:
        failure, _ = failed(replace(config, output_dir=str(disk)))
        assert (failure["code"], failure["step"]) == ("disk_full", 2)
        assert not (disk / "artifact").exists()
        again = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=str(whole(disk)[-1])))
    weights = "adapter_model.safetensors"
    assert (
        again.of("step") == []
        and again.of("finished")[0]["sha256"][weights] == undisturbed.of("finished")[0]["sha256"][weights]
    )


def test_who_dies_while_it_deletes_leaves_no_half_checkpoint_under_its_name(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(make_config(tiny_llama, tmp_path, tmp_path, keep_checkpoints=1), World(), "", "fp32", "torch")
    for step in (1, 2):
        (store.folder / f"step-{step:08d}").mkdir(parents=True)

    def killed(path: Path, **_: Any) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        store.prune(2)
    assert [path.name for path in store.folder.glob("step-*")] == ["step-00000002"]


def broken_at(step: int, breaks: Callable[[PlainEngine], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the update of this step."""
    update, calls = PlainEngine.step, []

    def tampered(self: PlainEngine, lr: float) -> float:
        calls.append(lr)
        if len(calls) == step:
            breaks(self)
        return update(self, lr)

    monkeypatch.setattr(PlainEngine, "step", tampered)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """`ahead`: as on an accelerator, where a step's numbers are read when the next one is under way."""
    monkeypatch.setattr(session, "runs_ahead", lambda world: ahead)
    config = make_config(tiny_llama, capitals, tmp_path / "1")
    undisturbed = train(config)

    def flip(engine: PlainEngine) -> None:
        gradient = engine._trained[0].parameter.grad
        assert gradient is not None
        gradient.view(-1)[0] = float("nan")

    with monkeypatch.context() as patched:
        broken_at(4, flip, patched)
        failure, wire = failed(replace(config, output_dir=str(tmp_path / "2")))
    assert (failure["code"], failure["fixable_by"], failure["step"]) == ("loss_not_finite", "user", 4 if ahead else 3)
    last = whole(tmp_path / "2")[-1]
    assert last.name == "step-00000003" == Path(wire.of("checkpoint")[-1]["path"]).name
    resumed = train(replace(config, output_dir=str(tmp_path / "3"), resume_from=str(last)))
    assert numbers(resumed.of("step")) == numbers(undisturbed.of("step"))[3:]


@pytest.mark.integration
def test_memory_that_the_system_refuses_is_out_of_memory(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(engine: PlainEngine) -> None:
        torch.empty(1 << 62, dtype=torch.uint8)

    broken_at(3, refuse, monkeypatch)
    failure, _ = failed(make_config(tiny_llama, capitals, tmp_path))
    assert (failure["code"], failure["fixable_by"]) == ("out_of_memory", "user") and "batch_size" in failure["hint"]
    assert whole(tmp_path)[-1].name == "step-00000002"
    assert describe(MemoryError("numpy")).code == "out_of_memory"


@pytest.mark.integration
def test_a_rank_that_hangs_is_not_waited_for_for_ever(
    child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", world_size=2, max_steps=100_000, collective_timeout_s=8.0
    )
    child.start(config)
    child.until("checkpoint")
    _, first, second = tree_of(child.pid)
    os.kill(max(first, second), signal.SIGSTOP)
    failure = child.until("failed")
    assert (failure["code"], failure["fixable_by"]) == ("rank_not_responding", "nobody") and failure["hint"]
    assert child.command("ping")["state"] == "failed", "it goes on to answer"
    until(lambda: tree_of(child.pid) == [child.pid])  # the one that hangs is ended too
    assert whole(tmp_path / "1")
