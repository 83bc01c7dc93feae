"""The numbers of a run: the same every time, undisturbed by checkpoints, resumption, micro-batches and evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Recorder, make_config, numbers
from builders_llama import capital_rows, make_tiny_llama, write_rows
from builders_methods import assert_same_weights, weights_of
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from trainers.child import session
from trainers.child.failure import TrainFailure
from trainers.child.loss import SummedLoss
from trainers.child.packing import PACKED_TOKENS, Piece
from trainers.child.rank import run_rank
from trainers.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def train(config: TrainConfig) -> Recorder:
    wire = Recorder()
    run_rank(config, 0, 1, wire)
    return wire


def checkpoint_of(wire: Recorder, step: int) -> str:
    return next(str(message["path"]) for message in wire.of("checkpoint") if message["step"] == step)


@pytest.mark.parametrize("kind", [{"training_type": "lora"}, {"training_type": "full"}, {"precision": "bf16"}])
def test_the_same_run_twice_gives_the_same_numbers(
    kind: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    first = train(make_config(tiny_llama, capitals, tmp_path / "1", **kind))
    second = train(make_config(tiny_llama, capitals, tmp_path / "2", **kind, checkpoint_every_s=1e9))
    assert numbers(first.of("step")) == numbers(second.of("step")) and len(first.of("step")) == 6
    assert [m["step"] for m in second.of("checkpoint")] == [6]
    weights = [
        {k: v for k, v in wire.of("finished")[0]["sha256"].items() if "safetensors" in k} for wire in (first, second)
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 1


@pytest.mark.parametrize(
    "kind",
    [
        {"training_type": "lora"},
        {"training_type": "full"},
        {"training_type": "full", "precision": "bf16"},
        {"training_type": "lora", "precision": "bf16", "weight_decay": 0.1},
    ],
)
def test_a_resumed_run_gives_the_numbers_of_the_undisturbed_one(
    kind: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", **kind)
    undisturbed = train(config)
    for step in (1, 4):
        resume_from = checkpoint_of(undisturbed, step)
        resumed = train(replace(config, output_dir=str(tmp_path / f"from-{step}"), resume_from=resume_from))
        assert resumed.of("ready")[0]["start_step"] == step
        assert numbers(resumed.of("step")) == numbers(undisturbed.of("step"))[step:]
        name = "adapter_model.safetensors" if kind["training_type"] == "lora" else "model.safetensors"
        assert resumed.of("finished")[0]["sha256"][name] == undisturbed.of("finished")[0]["sha256"][name]


def test_the_micro_batch_changes_neither_losses_nor_weights(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    runs = [
        train(make_config(tiny_llama, capitals, tmp_path / str(size), lora_dropout=0.0, lr=1e-3, micro_batch_size=size))
        for size in (1, 3, 4)
    ]
    losses = [[step["loss"] for step in run.of("step")] for run in runs]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) and losses[1] == pytest.approx(losses[2], rel=1e-5)
    for run in runs[:2]:
        assert_same_weights(weights_of(run), weights_of(runs[2]))


@pytest.mark.parametrize(("packing", "most"), [(None, PACKED_TOKENS), (False, 16 * 160)])
def test_rows_that_could_not_be_packed_take_as_many_tokens_as_packed_ones(
    packing: bool | None, most: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory estimate counts on that; only who declines packing has a micro-batch chosen with the memory in view."""
    windowed = shutil.copytree(tiny_llama, tmp_path / "windowed")
    config = json.loads((windowed / "config.json").read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    (windowed / "config.json").write_text(json.dumps(config | mistral))
    passes: list[int] = []
    forward = SummedLoss.forward

    def watched(loss: SummedLoss, piece: Piece, rows: int | None = None) -> torch.Tensor:
        passes.append(len(piece.ids) * len(piece.ids[0]))
        return forward(loss, piece, rows)

    monkeypatch.setattr(SummedLoss, "forward", watched)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the capital of france is paris " * 40}] * 16)
    train(make_config(windowed, rows, tmp_path / "out", batch_size=16, max_steps=1, max_seq_len=160, packing=packing))
    assert most // 2 < max(passes) <= most


@pytest.mark.parametrize(("cap", "most"), [(0.01, PACKED_TOKENS), (None, 16 * 160)])
def test_logits_that_must_exist_whole_do_so_for_few_tokens_of_an_evaluation(
    cap: float | None, most: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen long rows at once would be gigabytes of them."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(
        vocab_size=400, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=cap, **sizes
    )
    model = shutil.copytree(tiny_llama, tmp_path / "gemma", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(model)
    passes: list[int] = []
    forward = SummedLoss.forward

    def watched(loss: SummedLoss, piece: Piece, rows: int | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            passes.append(len(piece.ids) * len(piece.ids[0]))
        return forward(loss, piece, rows)

    monkeypatch.setattr(SummedLoss, "forward", watched)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the capital of france is paris " * 40}] * 16)
    shape = {"max_steps": 1, "max_seq_len": 160, "packing": False, "batch_size": 1}
    train(make_config(model, rows, tmp_path / "out", validation_file=str(rows), **shape))
    assert most // 2 < max(passes) <= most


def test_evaluation_changes_no_number_and_comes_before_during_and_after(
    tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    plain = train(make_config(tiny_llama, capitals, tmp_path / "1"))
    config = make_config(tiny_llama, capitals, tmp_path / "2", validation_file=str(capitals), eval_steps=2)
    watched = train(config)
    assert numbers(watched.of("step")) == numbers(plain.of("step"))
    assert [(m["when"], m["step"]) for m in watched.of("evaluated")] == [
        ("before", 0),
        ("during", 2),
        ("during", 4),
        ("after", 6),
    ]
    resumed = train(replace(config, output_dir=str(tmp_path / "3"), resume_from=checkpoint_of(watched, 3)))
    assert [(m["when"], m["step"]) for m in resumed.of("evaluated")] == [("during", 4), ("after", 6)]
    assert resumed.of("evaluated")[-1] == watched.of("evaluated")[-1]
    assert resumed.of("finished")[0]["metrics"] == watched.of("finished")[0]["metrics"]


def test_a_run_that_resumes_at_its_last_step_finishes(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2)
    first = train(config)
    again = train(replace(config, output_dir=str(tmp_path / "2"), resume_from=checkpoint_of(first, 2)))
    assert again.of("step") == [] and again.of("checkpoint") == []
    name = "adapter_model.safetensors"
    assert again.of("finished")[0]["sha256"][name] == first.of("finished")[0]["sha256"][name]


def test_full_training_learns_the_rows_by_heart(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(
        tiny_llama, capitals, tmp_path, training_type="full", lr=3e-3, max_steps=90, validation_file=str(capitals),
        checkpoint_every_s=1e9,
    )  # fmt: skip
    before, after = train(config).of("evaluated")
    assert before["exact_match"] == 0.0 and after["exact_match"] == 1.0
    assert after["loss"] < 0.5 < before["loss"] and after["rows"] == 10
    assert [sample["answer"] for sample in after["samples"]] == ["paris", "berlin", "rome"]
    assert "germany" in after["samples"][1]["prompt"]


def test_peft_alone_loads_the_artifact(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make_config(tiny_llama, capitals, tmp_path, metadata={"base_model": "tiny", "job": "ftjob-1"})
    artifact = Path(train(config).of("finished")[0]["artifact"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), artifact)
    trained = load_file(artifact / "adapter_model.safetensors")
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in trained.items())
    assert model.peft_config["default"].r == 4
    assert json.loads((artifact / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    assert AutoTokenizer.from_pretrained(artifact).chat_template
    assert "ftjob-1" in (artifact / "README.md").read_text()


def test_training_goes_on_from_an_adapter(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    first = train(make_config(tiny_llama, capitals, tmp_path / "1", lora_dropout=0.0))
    artifact = first.of("finished")[0]["artifact"]
    more = train(make_config(tiny_llama, capitals, tmp_path / "2", lora_dropout=0.0, adapter=artifact))
    assert more.of("step")[0]["loss"] < first.of("step")[0]["loss"]
    merged = train(make_config(tiny_llama, capitals, tmp_path / "3", training_type="full", adapter=artifact))
    assert merged.of("step")[0]["loss"] == pytest.approx(more.of("step")[0]["loss"], rel=1e-4)


def test_a_base_without_chat_template_gets_chatml_in_the_artifact(capitals: Path, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", chat_template=None)
    wire = train(make_config(base, capitals, tmp_path / "out", max_steps=1))
    assert "ChatML" in wire.of("log")[0]["message"]
    assert "im_start" in (Path(wire.of("finished")[0]["artifact"]) / "chat_template.jinja").read_text()


def failure_of(config: TrainConfig) -> tuple[TrainFailure, Recorder]:
    wire = Recorder()
    with pytest.raises(TrainFailure) as caught:
        run_rank(config, 0, 1, wire)
    assert wire.of("failed")[0]["code"] == caught.value.code
    return caught.value, wire


def test_a_loss_that_is_not_finite_fails_before_any_checkpoint(
    tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    failure, wire = failure_of(make_config(base, capitals, tmp_path / "out"))
    assert failure.code == "loss_not_finite" and failure.fixable_by == "user" and failure.hint
    assert wire.of("checkpoint") == [] and not (tmp_path / "out" / "checkpoints").exists()


def test_rows_without_loss_fail(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    failure, _ = failure_of(make_config(tiny_llama, write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out"))
    assert failure.code == "no_loss_tokens"


def test_the_memory_limit_is_kept(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    failure, wire = failure_of(make_config(tiny_llama, capitals, tmp_path, memory_limit_gb=-1.0))
    assert failure.code == "memory_limit_exceeded" and wire.of("finished") == []


@pytest.mark.parametrize("change", [{"lr": 2e-2}, {"seed": 1}])
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    wire = train(make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2))
    other = make_config(tiny_llama, capitals, tmp_path / "2", max_steps=2, resume_from=checkpoint_of(wire, 1), **change)
    assert failure_of(other)[0].code == "checkpoint_unusable"


@pytest.mark.parametrize("name", ["random.pt", "optimizer-00001.safetensors"])
def test_a_damaged_checkpoint_is_refused(name: str, tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2)
    damaged = Path(checkpoint_of(train(config), 1))
    (damaged / name).write_bytes((damaged / name).read_bytes()[:1000])
    assert failure_of(replace(config, resume_from=str(damaged)))[0].code == "checkpoint_unusable"


def test_an_unknown_layer_or_method_is_the_users_to_mend(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    failure, _ = failure_of(make_config(tiny_llama, capitals, tmp_path, target_modules=["no_such_layer"]))
    assert failure.code == "lora_not_applicable" and failure.fixable_by == "user"
    assert failure_of(make_config(tiny_llama, capitals, tmp_path, method="alchemy"))[0].code == "method_unsupported"


def test_long_rows_are_reported(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [*capital_rows(3), {"text": "rome " * 200}]
    wire = train(make_config(tiny_llama, write_rows(tmp_path / "d", rows), tmp_path, max_seq_len=64, max_steps=1))
    assert "1 rows are longer than 64 tokens" in wire.of("log")[0]["message"]


@pytest.mark.parametrize("kind", [{"training_type": "lora"}, {"training_type": "full", "precision": "bf16"}])
def test_layers_that_are_computed_twice_give_the_same_numbers(
    kind: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """With dropout: its draw is the same the second time."""
    plain, again = (
        train(make_config(tiny_llama, capitals, tmp_path / str(on), max_steps=3, gradient_checkpointing=on, **kind))
        for on in (False, True)
    )
    assert numbers(again.of("step")) == numbers(plain.of("step"))


def test_a_run_keeps_the_precision_that_it_began_with(tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=2)
    resume_from = checkpoint_of(train(config), 1)
    later = train(replace(config, output_dir=str(tmp_path / "2"), precision="auto", resume_from=resume_from))
    assert later.of("ready")[0]["precision"] == "fp32"


def test_a_device_that_is_a_step_behind_tells_the_same(
    tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: what checkpoints and evaluations say comes after the steps that they follow. How many steps pass while
    a checkpoint is written is the disk's affair."""

    def told(name: str) -> tuple[list[tuple[Any, ...]], list[int]]:
        config = make_config(
            tiny_llama, capitals, tmp_path / name, validation_file=str(capitals), eval_steps=3, checkpoint_every_s=1e9
        )
        wire = Recorder()
        run_rank(config, 0, 1, wire)
        names = ("step", "checkpoint", "evaluated", "finished")
        told = [(one["type"], one["step"], one.get("loss")) for one in wire.messages if one["type"] in names]
        for at, (what, step, _) in enumerate(told):
            assert what != "checkpoint" or ("step", step) in [one[:2] for one in told[:at]]
        return [one for one in told if one[0] != "checkpoint"], [step for what, step, _ in told if what == "checkpoint"]

    at_once = told("at-once")
    monkeypatch.setattr(session, "runs_ahead", lambda world: True)
    assert told("ahead") == at_once and len(at_once[0]) > 8 and at_once[1]
