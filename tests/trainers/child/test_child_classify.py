"""Classifiers: the same numbers as a plain loop, artifacts that the libraries load, and labels that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Child, make_config, numbers
from builders_llama import write_rows
from builders_methods import (
    assert_same_weights,
    checkpoint_of,
    label_rows,
    make_tiny_bert,
    train,
    weights_of,
)
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from trainers.child.convert import convert
from trainers.child.data import Plan
from trainers.child.failure import TrainFailure
from trainers.child.labels import names_of
from trainers.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
ROWS = label_rows(14)
NAMES = ["france", "germany", "italy", "spain"]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("labelled") / "rows.jsonl", ROWS)


def config_of(base: Path, rows: Path, out: Path, **fields: Any) -> TrainConfig:
    return make_config(
        base, rows, out, **{"task": "sequence_classification", "lora_dropout": 0.0, "lr": 3e-3, **fields}
    )


def logits_of(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits


def plain_loop(config: TrainConfig, whole: tuple[str, ...]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """transformers and peft alone, without dropout: the losses, and the final weights. `whole`: what is trained beside adapters."""
    hyper = config.hyperparams
    tokenizer = AutoTokenizer.from_pretrained(config.base_model)
    torch.manual_seed(hyper.seed)
    model = AutoModelForSequenceClassification.from_pretrained(config.base_model, num_labels=4)
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.training_type == "lora":
        torch.manual_seed(hyper.seed)
        lora = LoraConfig(
            r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=list(whole)
        )
        model = get_peft_model(model, lora)
    plan = Plan(len(ROWS), hyper)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hyper.lr, weight_decay=hyper.weight_decay)
    losses = []
    for step in range(1, plan.steps + 1):
        batch = [ROWS[row] for row in plan.batch(step)]
        logits = logits_of(model, tokenizer, [row["text"] for row in batch])
        loss = F.cross_entropy(logits, torch.tensor([NAMES.index(row["label"]) for row in batch]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, hyper.max_grad_norm)
        optimizer.param_groups[0]["lr"] = plan.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = get_peft_model_state_dict(model) if config.training_type == "lora" else model.state_dict()
    return losses, weights


@pytest.mark.integration
@pytest.mark.parametrize("training_type", ["lora", "full"])
@pytest.mark.parametrize(("base", "whole"), [("tiny_llama", ("score",)), ("tiny_bert", ("classifier", "pooler"))])
def test_a_plain_loop_gives_the_same_losses_and_weights(
    base: str,
    whole: tuple[str, ...],
    training_type: str,
    labelled: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder: Path = request.getfixturevalue(base)
    config = config_of(folder, labelled, tmp_path, training_type=training_type, checkpoint_every_s=1e9)
    wire = train(config)
    losses, weights = plain_loop(config, whole)
    assert [step["loss"] for step in wire.of("step")] == pytest.approx(losses, rel=1e-4)
    # a bias of BERT's keys moves all scores of a row alike: its gradient is rounding, which AdamW makes as large as any
    found = {name: value for name, value in weights_of(wire).items() if not name.endswith("key.bias")}
    assert len(found) > 10
    assert_same_weights(found, weights)


def test_bert_learns_and_transformers_alone_loads_it(tiny_bert: Path, labelled: Path, tmp_path: Path) -> None:
    config = config_of(
        tiny_bert, labelled, tmp_path, training_type="full", lr=1e-3, max_steps=60, validation_file=str(labelled),
        checkpoint_every_s=1e9,
    )  # fmt: skip
    wire = train(config)
    before, after = wire.of("evaluated")
    assert before["accuracy"] < 0.6 and after["accuracy"] == 1.0 and after["loss"] < before["loss"]
    assert after["samples"][0] == {"prompt": ROWS[0]["text"], "expected": "france", "answer": "france"}
    assert wire.of("finished")[0]["metrics"]["validation_accuracy"] == 1.0
    artifact = wire.of("finished")[0]["artifact"]
    model = AutoModelForSequenceClassification.from_pretrained(artifact)
    logits = logits_of(model, AutoTokenizer.from_pretrained(artifact), [row["text"] for row in ROWS])
    assert [model.config.id2label[int(place)] for place in logits.argmax(-1)] == [row["label"] for row in ROWS]


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_bert"])
def test_peft_alone_loads_an_adapter(
    base: str, precision: str, labelled: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    config = config_of(
        folder, labelled, tmp_path, precision=precision, max_steps=60, lora_alpha=8, checkpoint_every_s=1e9,
        validation_file=str(labelled),
    )  # fmt: skip
    wire = train(config)
    before, after = wire.of("evaluated")
    assert before["accuracy"] < 0.6 and after["accuracy"] >= 0.9
    artifact = wire.of("finished")[0]["artifact"]
    told = AutoConfig.from_pretrained(artifact)
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=told)
    model = PeftModel.from_pretrained(model, artifact).eval()
    logits = logits_of(model, AutoTokenizer.from_pretrained(artifact), [row["text"] for row in ROWS])
    right = sum(told.id2label[int(place)] == row["label"] for place, row in zip(logits.argmax(-1), ROWS, strict=True))
    assert right / len(ROWS) == after["accuracy"]


@pytest.mark.parametrize(
    "kind",
    [
        {"training_type": "lora", "precision": "bf16", "lora_dropout": 0.1},
        pytest.param({"training_type": "full"}, marks=pytest.mark.integration),
    ],
)
def test_a_resumed_run_gives_the_numbers_of_the_undisturbed_one(
    kind: dict[str, Any], tiny_bert: Path, labelled: Path, tmp_path: Path
) -> None:
    undisturbed = train(config := config_of(tiny_bert, labelled, tmp_path / "1", **kind))
    resumed = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(undisturbed, 4)))
    assert numbers(resumed.of("step")) == numbers(undisturbed.of("step"))[4:]
    weights = [{k: v for k, v in w.of("finished")[0]["sha256"].items() if "model" in k} for w in (resumed, undisturbed)]
    assert weights[0] == weights[1]


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_learn_what_one_does(
    precision: str, child: Child, tiny_llama: Path, labelled: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_llama, labelled, tmp_path / "1", max_steps=4, precision=precision)
    alone = train(config).of("step")
    together = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=2))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    assert [s["loss"] for s in together] == pytest.approx([s["loss"] for s in alone], rel=tolerance)


@pytest.mark.integration
def test_a_classifier_goes_on_with_its_own_labels_only(tiny_llama: Path, labelled: Path, tmp_path: Path) -> None:
    first = train(config := config_of(tiny_llama, labelled, tmp_path / "1", max_steps=40, lora_alpha=8))
    more = replace(config, output_dir=str(tmp_path / "2"), adapter=first.of("finished")[0]["artifact"])
    assert train(more).of("step")[0]["loss"] < 0.5 * first.of("step")[0]["loss"]
    others = write_rows(tmp_path / "others", [{"text": "rome", "label": 0}, {"text": "paris", "label": 1}])
    with pytest.raises(TrainFailure) as caught:
        train(replace(more, output_dir=str(tmp_path / "3"), train_file=str(others)))
    assert (caught.value.code, caught.value.fixable_by) == ("adapter_does_not_fit", "user")


def test_classes_are_numbered_in_the_order_of_their_labels() -> None:
    assert names_of([{"label": 10}, {"label": 9}, {"label": 10}]) == ["9", "10"]
    assert names_of([{"label": "b"}, {"label": "a"}]) == ["a", "b"]
    for labels in (["a"], [1, "1"], []):
        with pytest.raises(TrainFailure) as caught:
            names_of([{"label": label} for label in labels])
        assert caught.value.code == "labels_unusable"


def test_a_label_that_is_not_trained_on_is_named_by_its_row(tiny_bert: Path, labelled: Path, tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held", [*label_rows(2), {"text": "secret", "label": "secret"}])
    with pytest.raises(TrainFailure) as caught:
        train(config_of(tiny_bert, labelled, tmp_path, validation_file=str(held_out)))
    assert caught.value.code == "label_unknown" and "row 3" in caught.value.message
    assert "secret" not in caught.value.message


def test_texts_are_tokenised_once(tiny_bert: Path, labelled: Path, tmp_path: Path) -> None:
    def told(out: str) -> tuple[list[Any], list[Any]]:
        wire = train(config_of(tiny_bert, labelled, tmp_path / out, cache_dir=str(tmp_path / "cache"), max_steps=2))
        return [(one["what"], one["done"]) for one in wire.of("progress")], numbers(wire.of("step"))

    first, second = told("1"), told("2")
    rows = len(labelled.read_text().splitlines())
    assert (first[0], second[0]) == ([("tokenising", rows)], [])
    assert first[1] == second[1] != []


def test_long_texts_are_cut_to_what_the_encoder_takes(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [*label_rows(4), {"text": "rome " * 100, "label": "italy"}]
    file = write_rows(tmp_path / "rows", rows)
    wire = train(config_of(tiny_bert, file, tmp_path, max_steps=1))
    assert "1 rows are longer than 32 tokens; 0 of them are left out" in wire.of("log")[0]["message"]
    with pytest.raises(TrainFailure, match="row 5"):
        train(config_of(tiny_bert, file, tmp_path, overlength="error"))


def test_an_encoder_becomes_a_base_model_without_a_chat_template(tiny_bert: Path, tmp_path: Path) -> None:
    report = convert(str(tiny_bert), tmp_path / "out")
    assert (report.architecture, report.chat_template_source, report.warnings) == ("BertForMaskedLM", "none", [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "bert"
