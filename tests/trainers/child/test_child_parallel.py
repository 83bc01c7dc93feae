"""The same run on one rank and on several, whatever they share out: its numbers but for rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders_child import Child, make_config, numbers
from builders_llama import capital_rows, write_rows
from builders_methods import checkpoint_of, label_rows, preference_rows, train
from safetensors.torch import load_file

from trainers.protocol import Message

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def losses(steps: list[Message]) -> list[float]:
    return [step["loss"] for step in steps]


def weights_in(folder: str | Path) -> dict[str, torch.Tensor]:
    (file,) = (path for path in Path(folder).glob("*.safetensors") if "optimizer" not in path.name)
    return load_file(file)


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Each tensor to 1e-3 of its norm: AdamW divides by what may be tiny."""
    assert found.keys() == wanted.keys() and len(found) > 10
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.parametrize(
    ("stage", "training_type"), [(0, "full"), (1, "full"), (2, "lora"), (2, "full"), (3, "lora"), (3, "full")]
)
def test_two_ranks_learn_what_one_does(
    stage: int, training_type: str, child: Child, tiny_llama: Path, tmp_path: Path
) -> None:
    """Of the third step's one row, and of the last questions, the second rank has none."""
    rows = write_rows(tmp_path / "rows", capital_rows(9))
    config = make_config(
        tiny_llama, rows, tmp_path / "1", lora_dropout=0.0, lr=1e-3, max_steps=4, training_type=training_type,
        zero_stage=stage, validation_file=str(write_rows(tmp_path / "one", capital_rows(1))),
    )  # fmt: skip
    alone = train(config)
    together = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=2))
    assert losses(together) == pytest.approx(losses(alone.of("step")), rel=1e-4)
    norms = [[step["grad_norm"] for step in steps] for steps in (together, alone.of("step"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert_alike(weights_in(child.messages[-1]["artifact"]), weights_in(alone.of("finished")[0]["artifact"]))
    for evaluated, wanted in zip(child.of("evaluated"), alone.of("evaluated"), strict=True):
        assert evaluated["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert evaluated["samples"] == wanted["samples"]


@pytest.mark.parametrize(("size", "stage", "offload"), [(2, 2, "optimizer"), (1, 3, "parameters")])
def test_what_is_offloaded_learns_the_same(
    size: int, stage: int, offload: str, child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """To the host from the host: DeepSpeed goes the same ways, and needs no compiler for them."""
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0, lr=1e-3, max_steps=3, training_type="full"
    )
    wanted = losses(train(config).of("step"))
    hyper = replace(config.hyperparams, zero_stage=stage, offload=offload)
    made = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=size, hyperparams=hyper))
    assert losses(made) == pytest.approx(wanted, rel=1e-4)


def test_two_ranks_that_hold_parts_judge_alike(
    child: Child, second_child: Child, tiny_llama: Path, tmp_path: Path
) -> None:
    """DPO and a classifier with ZeRO-3, gradient checkpointing and validation rows of which one rank has none."""
    pairs, labels = write_rows(tmp_path / "pairs", preference_rows(9)), write_rows(tmp_path / "labels", label_rows(16))
    one_pair, one_label = write_rows(tmp_path / "pair", preference_rows(1)), write_rows(tmp_path / "l", label_rows(1))
    for made, rows, held_out, kind in (
        (child, pairs, one_pair, {"method": "dpo"}),
        (second_child, labels, one_label, {"task": "sequence_classification"}),
    ):
        config = make_config(
            tiny_llama, rows, tmp_path / f"of-{rows.name}-1", lora_dropout=0.0, lr=1e-3, max_steps=3, **kind,
            validation_file=str(held_out), zero_stage=3, gradient_checkpointing=True,
        )  # fmt: skip
        wanted = train(config)
        made.run(replace(config, output_dir=str(tmp_path / f"of-{rows.name}-2"), world_size=2))
        assert losses(made.steps) == pytest.approx(losses(wanted.of("step")), rel=1e-4)
        validated = [[message["loss"] for message in one.of("evaluated")] for one in (made, wanted)]
        assert validated[0] == pytest.approx(validated[1], rel=1e-4) and len(validated[0]) == 2
        assert_alike(weights_in(made.messages[-1]["artifact"]), weights_in(wanted.of("finished")[0]["artifact"]))


def test_an_adapter_is_merged_into_parted_weights(
    child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """All weights are trained on from a LoRA adapter; the second time by two ranks with ZeRO-3."""
    adapter = train(make_config(tiny_llama, capitals, tmp_path / "0", max_steps=3)).of("finished")[0]["artifact"]
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", lr=1e-3, max_steps=2, training_type="full", adapter=adapter, zero_stage=3
    )
    wanted = losses(train(config).of("step"))
    made = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=2))
    assert losses(made) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "training_type", "precision"), [(0, "lora", "fp32"), (2, "full", "bf16"), (3, "full", "fp32")]
)
def test_slots_may_become_more_and_fewer(
    stage: int, training_type: str, precision: str, child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """1 → 2 → 1 rank against one rank all the way: losses to 1e-4 in fp32, to 2e-2 in bf16."""
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0, lr=1e-3, training_type=training_type,
        precision=precision, zero_stage=stage,
    )  # fmt: skip
    undisturbed = train(config)
    on_two = replace(config, output_dir=str(tmp_path / "2"), world_size=2, resume_from=checkpoint_of(undisturbed, 2))
    two = child.run(on_two)
    last = replace(config, output_dir=str(tmp_path / "3"), resume_from=checkpoint_of(child, 4))
    again = train(last)
    assert again.of("ready")[0]["worlds"] == [[0, 1], [2, 2], [4, 1]]
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    wanted = losses(undisturbed.of("step"))
    assert losses(two) == pytest.approx(wanted[2:], rel=tolerance)
    assert losses(again.of("step")) == pytest.approx(wanted[4:], rel=tolerance)
    if precision == "fp32":
        found = weights_in(again.of("finished")[0]["artifact"])
        assert_alike(found, weights_in(undisturbed.of("finished")[0]["artifact"]))


@pytest.mark.parametrize(("stage", "training_type"), [(0, "lora"), (2, "full"), (3, "full")])
def test_as_many_ranks_go_on_bit_for_bit(
    stage: int, training_type: str, child: Child, second_child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(
        tiny_llama, capitals, tmp_path / "1", world_size=2, max_steps=4, training_type=training_type,
        precision="bf16" if training_type == "full" else "fp32", zero_stage=stage,
    )  # fmt: skip
    undisturbed = numbers(child.run(config))
    resumed = second_child.run(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(child, 2)))
    assert len(undisturbed) == 4 and numbers(resumed) == undisturbed[2:]
    one, other = (weights_in(made.messages[-1]["artifact"]) for made in (child, second_child))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
