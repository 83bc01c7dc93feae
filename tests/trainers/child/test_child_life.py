"""When a run ends early, what it validates on, what it may begin with, and how it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Recorder, make_config, numbers
from builders_llama import CHAT_TEMPLATE, capital_rows, make_tiny_llama, write_rows
from builders_methods import checkpoint_of, train

from trainers.child.engine import PlainEngine
from trainers.child.failure import TrainFailure
from trainers.child.rank import run_rank
from trainers.child.rows import split
from trainers.config import Hyperparams, TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def stopping(tiny_llama: Path, capitals: Path, tmp_path: Path) -> TrainConfig:
    """Learns what contradicts the rows that it is validated on; evaluated once an epoch, which is three steps."""
    other = {"france": "rome", "germany": "madrid", "italy": "paris", "spain": "berlin"}
    rows = capital_rows(4)
    for row in rows:
        country = row["messages"][1]["content"].split()[-1]
        row["messages"][2]["content"] = other[country]
    return make_config(
        tiny_llama, capitals, tmp_path / "1", validation_file=str(write_rows(tmp_path / "v", rows)), max_steps=60,
        lora_dropout=0.0, early_stopping_patience=2, exact_match_rows=0, checkpoint_every_s=1e9,
    )  # fmt: skip


@pytest.mark.integration
def test_a_run_stops_when_the_validation_loss_rises(stopping: TrainConfig, tmp_path: Path) -> None:
    wire = train(stopping)
    during = [message for message in wire.of("evaluated") if message["when"] == "during"]
    losses = [message["loss"] for message in during]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 3 and [message["step"] for message in during][:2] == [3, 6]
    finished = wire.of("finished")[0]
    assert finished["step"] == during[-1]["step"] < 60
    assert finished["metrics"]["best_step"] == during[best]["step"]
    assert finished["metrics"]["best_validation_loss"] == losses[best]
    assert f"step {during[best]['step']}" in wire.of("log")[-1]["message"]
    written = [message["step"] for message in wire.of("checkpoint")]
    assert during[best]["step"] in written and written[-1] == finished["step"]

    resumed = train(
        replace(stopping, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(wire, during[best]["step"]))
    )
    assert numbers(resumed.of("step")) == numbers(wire.of("step"))[during[best]["step"] :]
    assert resumed.of("finished")[0]["metrics"] == finished["metrics"]
    again = train(replace(stopping, output_dir=str(tmp_path / "3"), resume_from=checkpoint_of(wire, written[-1])))
    assert again.of("step") == [] and again.of("finished")[0]["step"] == finished["step"]


def test_rows_are_held_out(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    wire = train(make_config(tiny_llama, capitals, tmp_path, validation_split=0.25, max_steps=1))
    assert wire.of("ready")[0]["rows"] == 8
    assert [message["rows"] for message in wire.of("evaluated")] == [2, 2]


def test_a_split_is_drawn_from_the_seed_and_leaves_both_sides_a_row() -> None:
    rows = list(range(10))
    train_rows, held_out = split(rows, 3, 7)
    assert (train_rows, held_out) == split(rows, 3, 7) != split(rows, 3, 8)
    assert sorted(train_rows + held_out) == rows and len(held_out) == 3 and held_out == sorted(held_out)
    assert [Hyperparams(validation_split=share).held_out(10) for share in (None, 0.01, 0.26, 0.99)] == [0, 1, 3, 9]
    assert [Hyperparams(validation_split=0.5).held_out(count) for count in (0, 1, 2)] == [0, 0, 1]


@pytest.mark.integration
@pytest.mark.parametrize("kind", [{}, {"training_type": "full", "lr": 1e-3}])
def test_training_goes_on_from_the_weights_of_a_checkpoint(
    kind: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    first = train(make_config(tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0, **kind))
    weights = Path(checkpoint_of(first, 6))
    for file in ("state.json", "random.pt"):
        (weights / file).unlink()
    more = train(make_config(tiny_llama, capitals, tmp_path / "2", lora_dropout=0.0, adapter=str(weights), **kind))
    assert more.of("ready")[0]["start_step"] == 0
    assert more.of("step")[0]["loss"] < 0.9 * first.of("step")[0]["loss"]


@pytest.mark.integration
def test_rslora_is_written_down(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    plain, rs = (
        train(make_config(tiny_llama, capitals, tmp_path / str(on), max_steps=2, use_rslora=on, lora_dropout=0.0))
        for on in (False, True)
    )
    config = json.loads((Path(rs.of("finished")[0]["artifact"]) / "adapter_config.json").read_text())
    assert config["use_rslora"] is True
    assert plain.of("step")[1]["loss"] != rs.of("step")[1]["loss"], "the adapter counts for twice as much: sqrt(4)"


def test_qlora_without_a_gpu_is_refused(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainFailure, match="needs a GPU") as caught:
        train(make_config(tiny_llama, capitals, tmp_path, training_type="qlora"))
    assert (caught.value.code, caught.value.fixable_by) == ("qlora_unsupported", "user")


def test_a_step_without_enough_memory_is_done_again_with_half_the_rows(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0, lr=1e-3, packing=False)
    undisturbed = train(config)
    whole, sizes = PlainEngine.backward, []

    def tight(self: PlainEngine, loss: torch.Tensor, *, last: bool) -> None:
        """The first half of a step has room."""
        sizes.append(last)
        if len(sizes) in (5, 6):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        whole(self, loss, last=last)

    monkeypatch.setattr(PlainEngine, "backward", tight)
    wire = train(replace(config, output_dir=str(tmp_path / "2")))
    told = [message["message"] for message in wire.of("log")]
    assert told == [
        f"Step 5 ran out of memory; once more with at most {rows} row(s) in a forward pass." for rows in (2, 1)
    ]
    losses = [[step["loss"] for step in one.of("step")] for one in (wire, undisturbed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(sizes) == 4 + 2 + 4 + 2


def test_one_row_that_does_not_fit_is_a_failure(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: PlainEngine, loss: torch.Tensor, *, last: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PlainEngine, "backward", full)
    wire = Recorder()
    with pytest.raises(torch.OutOfMemoryError):
        run_rank(make_config(tiny_llama, capitals, tmp_path), 0, 1, wire)
    failed = wire.of("failed")[0]
    assert (failed["code"], failed["fixable_by"]) == ("out_of_memory", "user") and "max_seq_len" in failed["hint"]


def test_an_update_that_does_not_fit_is_not_tried_twice(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def full(self: PlainEngine, lr: float) -> float:
        calls.append(lr)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PlainEngine, "step", full)
    with pytest.raises(TrainFailure) as caught:
        train(make_config(tiny_llama, capitals, tmp_path))
    assert caught.value.code == "out_of_memory" and len(calls) == 1


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(what: Any, path: Path) -> None:
        """The third one meets a device without room."""
        torch_save(what, path if "00000003" not in str(path) else Path("/dev/full"))

    torch_save = torch.save
    monkeypatch.setattr("trainers.child.checkpoint.torch.save", save)
    wire = Recorder()
    with pytest.raises((OSError, RuntimeError)):
        run_rank(make_config(tiny_llama, capitals, tmp_path), 0, 1, wire)
    failed = wire.of("failed")[0]
    assert (failed["code"], failed["fixable_by"], failed["step"]) == ("disk_full", "operator", 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000001", "step-00000002"]


def test_broken_rows_are_named_and_not_shown(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(capitals.read_text() + '{"text": "secret\n')
    with pytest.raises(TrainFailure, match="Row 11 of rows") as caught:
        train(make_config(tiny_llama, rows, tmp_path))
    assert caught.value.code == "row_broken" and "secret" not in caught.value.message


def test_a_row_that_the_chat_template_refuses_is_the_users_to_mend(capitals: Path, tmp_path: Path) -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + CHAT_TEMPLATE
    wire = Recorder()
    with pytest.raises(Exception, match="no system turns"):
        run_rank(make_config(make_tiny_llama(tmp_path / "b", chat_template=strict), capitals, tmp_path), 0, 1, wire)
    failed = wire.of("failed")[0]
    assert (failed["code"], failed["fixable_by"]) == ("row_not_renderable", "user")
