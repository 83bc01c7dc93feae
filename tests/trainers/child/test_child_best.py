"""Which weights an artifact has, and in which forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders_child import Recorder, make_config, numbers
from builders_llama import capital_rows, write_rows
from builders_methods import checkpoint_of, label_rows, make_tiny_bert, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trainers.child.artifact import load_saved, save_model
from trainers.child.failure import TrainFailure
from trainers.child.outputs.history import FILE, MOST_STEPS, Journal
from trainers.child.world import World
from trainers.config import TrainConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::DeprecationWarning")
]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def overfitting(tiny_llama: Path, capitals: Path, tmp_path: Path) -> TrainConfig:
    """The validation rows contradict the others: the loss on them falls first, and then rises."""
    other = {"france": "rome", "germany": "madrid", "italy": "paris", "spain": "berlin"}
    rows = capital_rows(4)
    for row in rows:
        row["messages"][2]["content"] = other[row["messages"][1]["content"].split()[-1]]
    return make_config(
        tiny_llama, capitals, tmp_path / "1", validation_file=str(write_rows(tmp_path / "v", rows)), max_steps=36,
        eval_steps=6, lr_scheduler="constant", lora_dropout=0.0, exact_match_rows=0, checkpoint_every_s=1e9,
        load_best_model_at_end=True,
        keep_checkpoints=1,
    )  # fmt: skip


def saving(message: dict[str, object]) -> list[dict[str, object]]:
    """Every checkpoint is durable at once, so that older ones go."""
    return [{"type": "saved", "step": message["step"]}] if message["type"] == "checkpoint" else []


@pytest.mark.integration
def test_the_artifact_has_the_weights_with_the_lowest_validation_loss(overfitting: TrainConfig, tmp_path: Path) -> None:
    from trainers.child.rank import run_rank

    wire = Recorder(saving)
    run_rank(overfitting, 0, 1, wire)
    during = {message["step"]: message["loss"] for message in wire.of("evaluated") if message["when"] == "during"}
    best = min(during, key=lambda step: during[step])
    assert 0 < best < 36 and list(during) == list(range(6, 37, 6)), f"the last weights compete too: {during}"
    finished = wire.of("finished")[0]
    assert finished["step"] == 36 and finished["metrics"]["weights_of_step"] == best
    assert wire.of("evaluated")[-1]["when"] == "after" and wire.of("evaluated")[-1]["loss"] == during[best]
    written = {message["step"]: message for message in wire.of("checkpoint")}
    assert finished["sha256"][WEIGHTS] == written[best]["sha256"][WEIGHTS] != written[36]["sha256"][WEIGHTS]

    last = replace(overfitting, output_dir=str(tmp_path / "2"), resume_from=written[36]["path"])
    elsewhere = train(replace(last, best_checkpoint=written[best]["path"]))
    assert elsewhere.of("finished")[0]["sha256"][WEIGHTS] == finished["sha256"][WEIGHTS]
    assert elsewhere.of("finished")[0]["metrics"] == finished["metrics"]
    lost = train(replace(last, output_dir=str(tmp_path / "3")))
    assert lost.of("finished")[0]["sha256"][WEIGHTS] == written[36]["sha256"][WEIGHTS]
    assert f"step {best} was not kept" in lost.of("log")[0]["message"]

    hyper = replace(overfitting.hyperparams, load_best_model_at_end=None)
    plain = train(replace(overfitting, output_dir=str(tmp_path / "4"), hyperparams=hyper))
    assert plain.of("finished")[0]["sha256"][WEIGHTS] == written[36]["sha256"][WEIGHTS]
    assert numbers(plain.of("step")) == numbers(wire.of("step")), "it changes no number"


def test_saved_weights_are_put_back_whole(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    load_saved(model, tmp_path, World())
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


@pytest.mark.integration
def test_other_forms_lie_beside_the_adapter(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_llama,
        capitals,
        tmp_path,
        max_steps=3,
        lora_dropout=0.0,
        outputs=["merged", "gguf", "curves", "tensorboard"],
    )
    finished = train(config).of("finished")[0]
    artifact = Path(finished["artifact"])
    assert {"adapter_config.json", WEIGHTS, "README.md", FILE, "curves.png", "gguf/model.gguf"} <= set(
        finished["sha256"]
    )
    assert any(name.startswith("tensorboard/events.") for name in finished["sha256"])
    assert (
        not (artifact / "merged" / "adapter_config.json").exists() and (artifact / "merged" / "tokenizer.json").exists()
    )
    assert (artifact / "curves.png").read_bytes().startswith(b"\x89PNG")
    ids = torch.tensor([[5, 9, 12, 40]])
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, artifact)(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(artifact / "merged", dtype=torch.float32)(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-4)
    steps = [json.loads(line) for line in (artifact / FILE).read_text().splitlines()]
    assert [one["step"] for one in steps if one["type"] == "step"] == [1, 2, 3]


def test_gguf_alone_leaves_no_merged_model(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path, max_steps=1, outputs=["gguf"])
    names = set(train(config).of("finished")[0]["sha256"])
    assert "gguf/model.gguf" in names and not any(name.startswith("merged/") for name in names)


def test_a_form_that_the_model_can_never_have_is_refused_before_the_first_step(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", label_rows(8))
    bert = make_tiny_bert(tmp_path / "bert")
    config = make_config(bert, rows, tmp_path / "out", task="sequence_classification", outputs=["merged"])
    with pytest.raises(TrainFailure, match="causal") as caught:
        train(config)
    assert caught.value.code == "output_unsupported" and not (tmp_path / "out").exists()


@pytest.mark.integration
def test_the_journal_of_a_run_that_was_cut_is_whole(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=4)
    first = train(config)
    resumed = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(first, 2)))
    of_steps = [Path(wire.of("finished")[0]["artifact"]) / FILE for wire in (first, resumed)]
    assert of_steps[0].read_text() == of_steps[1].read_text()
    assert load_file(of_steps[1].parent / WEIGHTS)


def test_a_long_journal_keeps_every_second_step_and_all_evaluations(tmp_path: Path) -> None:
    journal = Journal()
    for step in range(1, 3 * MOST_STEPS):
        journal.add("step", step, {"loss": 1.0 / step, "samples": ["not kept"]})
        if step % 1000 == 0:
            journal.add("evaluated", step, {"loss": 2.0, "when": "during"})
    journal.write(tmp_path)
    again = Journal()
    again.read(tmp_path)
    series = again.history().series
    assert [step for step, _ in series["train/loss"]] == list(range(4, 3 * MOST_STEPS, 4))
    assert len(series["validation/loss"]) == 12 and "samples" not in (tmp_path / FILE).read_text()
