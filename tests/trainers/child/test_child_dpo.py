"""Preference training: the same numbers as a plain loop, as TRL's formula, and after an interruption."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Child, make_config, numbers
from builders_llama import make_tokenizer, write_rows
from builders_methods import checkpoint_of, preference_rows, train
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.child.data import IGNORED, Example, Plan
from trainers.child.failure import TrainFailure
from trainers.child.preference import encode_pairs, sides
from trainers.config import Hyperparams, TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten: the third batch of four is short."""
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preference_rows(10))


def log_prob(model: Any, example: Example) -> torch.Tensor:
    """Of one answer, one row at a time, over all logits."""
    logits = model(torch.tensor([example.ids])).logits[0, :-1]
    labels = torch.tensor(example.labels[1:])
    found = logits.log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)]
    return found[labels != IGNORED].sum()


def plain_loop(config: TrainConfig, rows: list[dict[str, Any]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """DPO with transformers and peft alone, the reference a frozen copy that is asked in each step: losses, weights."""
    hyper = config.hyperparams
    model = AutoModelForCausalLM.from_pretrained(config.base_model)
    reference = deepcopy(model)
    if config.training_type == "lora":
        torch.manual_seed(hyper.seed)
        lora = LoraConfig(r=hyper.lora_r, lora_alpha=hyper.lora_alpha, target_modules="all-linear")
        model = get_peft_model(model, lora)
    encoded = encode_pairs(rows, AutoTokenizer.from_pretrained(config.base_model), hyper, 512).pairs
    plan = Plan(len(encoded), hyper)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=hyper.lr, weight_decay=hyper.weight_decay)
    losses = []
    for step in range(1, plan.steps + 1):
        batch = [encoded[row] for row in plan.batch(step)]
        total = torch.zeros(())
        for pair in batch:
            with torch.no_grad():
                before = log_prob(reference, pair.chosen) - log_prob(reference, pair.rejected)
            now = log_prob(model, pair.chosen) - log_prob(model, pair.rejected)
            total = total - F.logsigmoid(hyper.beta * (now - before))
        (total / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(trained, hyper.max_grad_norm)
        optimizer.param_groups[0]["lr"] = plan.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / len(batch)))
    weights = get_peft_model_state_dict(model) if config.training_type == "lora" else model.state_dict()
    return losses, weights


@pytest.mark.parametrize(
    ("training_type", "lr"), [("lora", 1e-2), pytest.param("full", 1e-3, marks=pytest.mark.integration)]
)
def test_a_plain_loop_gives_the_same_losses_and_weights(
    training_type: str, lr: float, tiny_llama: Path, pairs: Path, tmp_path: Path
) -> None:
    config = make_config(
        tiny_llama, pairs, tmp_path, method="dpo", training_type=training_type, lr=lr, lora_dropout=0.0, beta=0.3
    )
    wire = train(config)
    losses, weights = plain_loop(config, preference_rows(10))
    steps = wire.of("step")
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-4)
    assert steps[0]["loss"] == pytest.approx(math.log(2)) and steps[-1]["loss"] < 0.6
    assert steps[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5) and steps[-1]["reward_accuracy"] == 1.0
    name = "adapter_model.safetensors" if training_type == "lora" else "model.safetensors"
    ours = load_file(Path(wire.of("finished")[0]["artifact"]) / name)
    assert ours and set(ours) <= set(weights)
    for key, value in ours.items():  # Adam divides by the gradient's size: tiny differences show where it is tiny
        assert torch.allclose(value, weights[key], rtol=1e-3, atol=lr / 20), key


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_trl_computes_the_same_losses(tiny_llama: Path, tmp_path: Path) -> None:
    """Full training on one batch of text pairs, at a constant rate."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL's datasets is not installed")
    rows = [
        {
            "prompt": row["prompt"][0]["content"],
            **{side: f" {row[side][0]['content']}" for side in ("chosen", "rejected")},
        }
        for row in preference_rows(8)
    ]
    fields = {"training_type": "full", "lr": 1e-3, "lr_scheduler": "constant", "warmup_ratio": 0.0}
    config = make_config(
        tiny_llama, write_rows(tmp_path / "rows", rows), tmp_path, method="dpo", batch_size=8, beta=0.3, max_steps=5,
        **fields,
    )  # fmt: skip
    ours = [step["loss"] for step in train(config).of("step")]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, max_steps=5, beta=0.3, use_cpu=True,
        report_to="none", save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False,
        learning_rate=1e-3, lr_scheduler_type="constant", disable_tqdm=True,
    )  # fmt: skip
    model, reference = (AutoModelForCausalLM.from_pretrained(tiny_llama) for _ in range(2))
    trainer = trl.DPOTrainer(
        model, reference, args=arguments, processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4) and ours[-1] < 0.6


FULL = pytest.param({"training_type": "full", "precision": "bf16"}, marks=pytest.mark.integration)


@pytest.mark.parametrize("kind", [{"training_type": "lora"}, FULL])
def test_a_resumed_run_gives_the_numbers_of_the_undisturbed_one(
    kind: dict[str, Any], tiny_llama: Path, pairs: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, pairs, tmp_path / "1", method="dpo", validation_file=str(pairs), **kind)
    undisturbed = train(config)
    resumed = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(undisturbed, 4)))
    asked = [told for told in resumed.of("progress") if told["what"] != "tokenising"]
    assert asked == [], "the checkpoint knows what the reference thinks"
    assert numbers(resumed.of("step")) == numbers(undisturbed.of("step"))[4:]
    assert resumed.of("evaluated")[-1] == undisturbed.of("evaluated")[-1]
    weights = [{k: v for k, v in w.of("finished")[0]["sha256"].items() if "model" in k} for w in (resumed, undisturbed)]
    assert weights[0] == weights[1]


@pytest.mark.integration
def test_two_ranks_learn_what_one_does(child: Child, tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, pairs, tmp_path / "1", method="dpo", lora_dropout=0.0, lr=1e-3, max_steps=4)
    alone = train(config).of("step")
    together = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=2))
    assert [s["loss"] for s in together] == pytest.approx([s["loss"] for s in alone], rel=1e-4)
    assert [s["reward_margin"] for s in together] == pytest.approx([s["reward_margin"] for s in alone], abs=1e-4)


@pytest.mark.integration
def test_the_reference_is_the_adapter_that_the_run_begins_with(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    first = train(make_config(tiny_llama, pairs, tmp_path / "1", method="dpo", max_steps=3, lora_dropout=0.0))
    adapter = first.of("finished")[0]["artifact"]
    more = train(
        make_config(tiny_llama, pairs, tmp_path / "2", method="dpo", lora_dropout=0.0, lr=1e-3, adapter=adapter)
    )
    losses = [step["loss"] for step in more.of("step")]
    assert losses[0] == pytest.approx(math.log(2)) and losses[1] < losses[0]


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_without_a_prompt_it_is_what_both_sides_begin_with() -> None:
    text = {"chosen": "Is it dark? Yes.", "rejected": "Is it dark? Perhaps."}
    assert [side["prompt"] for side in sides(text)] == ["Is it dark?"] * 2
    assert [side["completion"] for side in sides(text)] == [" Yes.", " Perhaps."]
    asked, yes, no = said("user", "Dark?"), said("assistant", "Yes."), said("assistant", "No.")
    earlier = said("assistant", "Hello.")
    chosen, rejected = sides({"chosen": [earlier, asked, yes], "rejected": [earlier, asked, no]})
    assert chosen["messages"] == [{**earlier, "weight": 0}, asked, yes] and rejected["messages"][-1] == no


def test_a_side_is_never_all_prompt() -> None:
    assert [side["completion"] for side in sides({"chosen": "ab", "rejected": "abc"})] == ["b", "bc"]
    assert [side["completion"] for side in sides({"chosen": "same", "rejected": "same"})] == ["e", "e"]


def test_only_the_answers_carry_loss() -> None:
    tokenizer = make_tokenizer()
    (pair,) = encode_pairs(preference_rows(1), tokenizer, Hyperparams(), None).pairs
    assert tokenizer.decode([t for t in pair.chosen.labels if t != IGNORED]) == "paris<|im_end|>"
    assert tokenizer.decode([t for t in pair.rejected.labels if t != IGNORED]) == "a berlin<|im_end|>"


def long_pairs() -> list[dict[str, Any]]:
    long = {"prompt": "rome " * 40, "chosen": "paris", "rejected": "berlin"}
    return [{"prompt": "a ", "chosen": "paris", "rejected": "rome " * 30}, long]


def test_pairs_that_are_too_long_are_cut_dropped_or_refused() -> None:
    def encoded(**hyper: Any) -> Any:
        return encode_pairs(long_pairs(), make_tokenizer(), Hyperparams(max_seq_len=20, **hyper), None)

    cut = encoded()
    assert (len(cut.pairs), cut.truncated, cut.dropped, cut.max_seq_len) == (1, 2, 1, 20)
    assert len(cut.pairs[0].rejected.ids) == 20
    with pytest.raises(TrainFailure, match="2 rows are longer than 20 tokens"):
        encoded(overlength="error")
    with pytest.raises(TrainFailure, match="No row has an answer left"):
        encoded(overlength="drop")


def test_pairs_are_tokenised_once(tiny_llama: Path, pairs: Path, tmp_path: Path) -> None:
    def told(out: str) -> tuple[list[Any], list[Any]]:
        wire = train(
            make_config(tiny_llama, pairs, tmp_path / out, method="dpo", cache_dir=str(tmp_path / "c"), max_steps=2)
        )
        tokenised = [(one["done"], one["total"]) for one in wire.of("progress") if one["what"] == "tokenising"]
        return tokenised, numbers(wire.of("step"))

    first, second = told("1"), told("2")
    assert (first[0], second[0]) == ([(10, 10)], [])
    assert first[1] == second[1] != []


def test_a_row_without_an_answer_is_named() -> None:
    rows = [*preference_rows(1), {"prompt": "a", "chosen": "b", "rejected": ""}]
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TrainFailure, match="Row 2") as caught:
        encode_pairs(rows, tokenizer, Hyperparams(), None)
    assert caught.value.code == "no_loss_tokens"
