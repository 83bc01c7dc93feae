"""What takes long says that it goes on: the scheduler takes a run that says nothing for one that hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders_child import make_config, numbers
from builders_llama import write_rows
from builders_methods import label_rows, make_tiny_bert, preference_rows, train

from trainers.child import control
from trainers.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def config_of(method: str, tiny_llama: Path, capitals: Path, root: Path) -> TrainConfig:
    """Steps of two forward passes, evaluations of several."""
    hyper = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "lora_dropout": 0.0, "packing": False}
    fields: dict[str, Any] = {**hyper, "checkpoint_every_s": 1e9}
    if method == "classify":
        rows = write_rows(root / "rows", label_rows(12))
        return make_config(
            make_tiny_bert(root / "bert"), rows, root / "out", task="sequence_classification",
            validation_file=str(rows), **fields,
        )  # fmt: skip
    rows = write_rows(root / "rows", preference_rows(12)) if method == "dpo" else capitals
    return make_config(tiny_llama, rows, root / "out", method=method, validation_file=str(rows), **fields)


@pytest.mark.parametrize(("method", "shown"), [("sft", "rows"), ("dpo", "pairs"), ("classify", "rows")])
def test_evaluations_steps_and_checkpoints_say_how_far_they_are(
    method: str, shown: str, tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PROGRESS_S", 0.0)
    wire = train(config_of(method, tiny_llama, capitals, tmp_path))
    types = [message["type"] for message in wire.messages]
    told = {what: [m for m in wire.of("progress") if m["what"] == what] for what in _whats(wire.messages)}

    before = types.index("evaluated")
    evaluation = told[f"evaluation, {shown}"]
    assert [one for one in wire.messages[:before] if one in evaluation], "within the evaluation"
    assert all(0 < one["done"] <= one["total"] for one in evaluation)
    assert evaluation[-1]["done"] == evaluation[-1]["total"]
    assert [(one["done"], one["total"]) for one in told["step 1, forward passes"]] == [(1, 2), (2, 2)]
    assert told["checkpoint of step 2, tensors"]
    if method == "sft":
        assert told["evaluation, answers"] and told["evaluation, tokens of the answers"]


def _whats(messages: list[dict[str, Any]]) -> set[str]:
    return {message["what"] for message in messages if message["type"] == "progress"}


def test_what_is_short_says_nothing_and_no_number_moves(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "PROGRESS_S", 1e9)
    silent = train(config_of("sft", tiny_llama, capitals, tmp_path / "1"))
    monkeypatch.setattr(control, "PROGRESS_S", 0.0)
    telling = train(config_of("sft", tiny_llama, capitals, tmp_path / "2"))
    assert "progress" not in [message["type"] for message in silent.messages if message.get("what") != "tokenising"]
    assert numbers(silent.of("step")) == numbers(telling.of("step"))
    scores = [
        [one[key] for one in wire.of("evaluated") for key in ("loss", "exact_match")] for wire in (silent, telling)
    ]
    assert scores[0] == scores[1]
