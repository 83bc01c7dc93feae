"""The child's training against a plain transformers + peft loop, and against itself cut in other ways."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Recorder, make_config, numbers
from builders_methods import assert_same_weights, checkpoint_of, train, weights_of

from trainers.child.data import Plan, encode
from trainers.child.failure import TrainFailure
from trainers.child.rank import run_rank
from trainers.child.rows import read_data
from trainers.config import TrainConfig

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def losses(wire: Recorder) -> list[float]:
    return [float(step["loss"]) for step in wire.of("step")]


def plain_run(config: TrainConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses, final weights) of a loop over padded batches with nothing of ours but rows, tokens and schedule."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hyper = config.hyperparams
    tokenizer = AutoTokenizer.from_pretrained(config.base_model)
    model = AutoModelForCausalLM.from_pretrained(config.base_model, dtype=torch.float32).train()
    if config.training_type == "lora":
        torch.manual_seed(hyper.seed)
        lora = LoraConfig(
            r=hyper.lora_r, lora_alpha=hyper.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
    examples = encode(read_data(config)[0], tokenizer, hyper, None).examples
    plan = Plan(len(examples), hyper)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=hyper.weight_decay)
    found = []
    for step in range(1, plan.steps + 1):
        batch = [examples[row] for row in plan.batch(step)]
        width = max(len(one.ids) for one in batch)
        ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in batch])
        labels = torch.tensor([one.labels + [-100] * (width - len(one.ids)) for one in batch])
        mask = torch.tensor([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, hyper.max_grad_norm)
        optimizer.param_groups[0]["lr"] = plan.lr(step)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    of_adapter = config.training_type == "lora"
    return found, get_peft_model_state_dict(model) if of_adapter else dict(model.named_parameters())


@pytest.mark.parametrize("training_type", ["lora", "full"])
@pytest.mark.parametrize("packing", [True, False])
def test_it_learns_what_a_plain_loop_learns(
    training_type: str, packing: bool, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """In fp32 after six steps: losses to 1e-5, each weight tensor to 1e-3 of its norm (AdamW divides by what may be tiny)."""
    config = make_config(
        tiny_llama, capitals, tmp_path, lora_dropout=0.0, lr=1e-3, training_type=training_type, packing=packing
    )
    wire = train(config)
    wanted, weights = plain_run(config)
    assert losses(wire) == pytest.approx(wanted, rel=1e-5)
    found = weights_of(wire)
    assert len(found) > 10
    assert_same_weights(found, weights)


def test_packing_is_on_and_changes_rounding_only(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "auto", lora_dropout=0.0, lr=1e-3)
    auto, on, off = (
        train(replace(config, output_dir=str(tmp_path / str(packing)), hyperparams=hyper))
        for packing in (None, True, False)
        for hyper in [replace(config.hyperparams, packing=packing)]
    )
    assert numbers(auto.of("step")) == numbers(on.of("step")) != numbers(off.of("step"))
    assert losses(on) == pytest.approx(losses(off), rel=1e-5)
    assert_same_weights(weights_of(on), weights_of(off))


def test_packing_belongs_to_the_identity(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2)
    first = train(config)
    other = replace(
        config,
        output_dir=str(tmp_path / "2"),
        resume_from=checkpoint_of(first, 1),
        hyperparams=replace(config.hyperparams, packing=False),
    )
    with pytest.raises(TrainFailure) as caught:
        run_rank(other, 0, 1, Recorder())
    assert caught.value.code == "checkpoint_unusable"


@pytest.mark.parametrize("packing", [True, False])
def test_the_data_cursor_survives_another_micro_batch(
    packing: bool, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """Accumulation equals the large batch to 1e-5, also when it begins in the middle of an epoch."""
    config = make_config(tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0, lr=1e-3, packing=packing)
    whole = train(config)
    smaller: dict[str, Any] = {"hyperparams": replace(config.hyperparams, micro_batch_size=1)}
    resumed = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(whole, 2), **smaller))
    assert losses(resumed) == pytest.approx(losses(whole)[2:], rel=1e-5)
    assert_same_weights(weights_of(resumed), weights_of(whole))
    assert [s["tokens"] for s in resumed.of("step")] == [s["tokens"] for s in whole.of("step")][2:]


def test_bfloat16_learns_what_float32_learns(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    """To 2 % of the loss: the adapter is computed in bfloat16 over fp32 masters."""
    wide, narrow = (
        train(make_config(tiny_llama, capitals, tmp_path / kind, lora_dropout=0.0, lr=1e-3, precision=kind))
        for kind in ("fp32", "bf16")
    )
    assert losses(narrow) == pytest.approx(losses(wide), rel=2e-2)
