"""Trainings with Liger's kernels, which Triton's interpreter computes on a processor, against the same with torch's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders_child import Child, Recorder, Zygote, make_config, numbers, zygote
from builders_llama import capital_rows, write_rows
from builders_methods import checkpoint_of, label_rows, make_tiny_bert, preference_rows, train

from trainers.child import kernels
from trainers.config import TrainConfig
from trainers.protocol import Message

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

HERE = Path(__file__).parent
FAULTY = """
import triton_on_cpu
from liger_kernel.ops import rope

class Faulty:
    whole = rope._triton_rope

    def __getitem__(self, grid):
        def launch(*arguments, BACKWARD_PASS, **options):
            if {kind!r} == "raises":
                raise RuntimeError("Failed to find C compiler.")
            if {kind!r} == "goes forward only" and not BACKWARD_PASS:
                self.whole[grid](*arguments, BACKWARD_PASS=False, **options)
        return launch

rope._triton_rope = Faulty()
"""


@pytest.fixture(scope="session")
def on_cpu() -> dict[str, str]:
    """The environment of a process that finds triton and liger_kernel, which have a folder of their own."""
    folder = Path(sys.prefix) / "liger"
    if not (folder / "liger_kernel").is_dir():
        pytest.skip("triton and liger-kernel are not installed: make install-test")
    path = os.pathsep.join([str(folder), str(HERE), *sys.path])
    return {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}


@pytest.fixture(scope="session")
def _fused(on_cpu: dict[str, str]) -> Iterator[Zygote]:
    with zygote("import triton_on_cpu", **on_cpu) as started:
        yield started


@pytest.fixture
def fused(_fused: Zygote) -> Callable[[], Child]:
    """Children that can use Liger's kernels."""
    return _fused.child


def short(base: Path, rows: Path, out: Path, **fields: Any) -> TrainConfig:
    """Interpreted kernels take a millisecond a token."""
    fields = {
        "max_steps": 2,
        "batch_size": 2,
        "lr": 1e-3,
        "lora_dropout": 0.0,
        "sample_rows": 0,
        "max_new_tokens": 2,
        **fields,
    }
    return make_config(base, rows, out, **fields)


def losses(steps: list[Message]) -> list[float]:
    return [step["loss"] for step in steps]


def told(child: Child | Recorder) -> list[str]:
    return [message["message"] for message in child.of("log")]


def weights_of(wire: Child | Recorder) -> bytes:
    return next(Path(wire.of("finished")[0]["artifact"]).glob("*.safetensors")).read_bytes()


@pytest.mark.integration
def test_every_family_computes_the_same(on_cpu: dict[str, str]) -> None:
    """In float32 to 1e-6, in bfloat16 to 2e-2; and as before, bit for bit, when the kernels are taken out."""
    command = [sys.executable, str(HERE / "kernels_compared.py")]
    done = subprocess.run(command, env={**os.environ, **on_cpu}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2 * len(kernels.FAMILIES)
    for name, one in found.items():
        most = 1e-6 if name.endswith("float32") else 2e-2
        assert max(one["states"], one["gradients"]) < most, name
        assert one["states"] + one["gradients"] > 0 or "gemma" in name, f"{name}: nothing else was computed"
        assert one["replaced"] == 2 and one["back"], name  # classes: norms and gated layers


@pytest.mark.integration
@pytest.mark.parametrize(
    "fields",
    [
        {"training_type": "lora"},
        {"training_type": "full", "gradient_checkpointing": True},
        {"training_type": "full", "precision": "bf16"},
        {"method": "dpo"},
        {"task": "sequence_classification"},
    ],
    ids=["lora", "full", "bf16", "dpo", "classification"],
)
def test_a_training_learns_what_it_does_with_torchs(
    fields: dict[str, Any], fused: Callable[[], Child], tiny_llama: Path, tmp_path: Path
) -> None:
    """And its evaluations, in which it answers questions, find the same."""
    kind = preference_rows if "method" in fields else label_rows if "task" in fields else capital_rows
    rows, held_out = (write_rows(tmp_path / f"{count}.jsonl", kind(count)) for count in (8, 1))
    config = short(tiny_llama, rows, tmp_path / "1", validation_file=str(held_out), **fields)
    wanted = train(config)
    child = fused()
    steps = child.run(replace(config, output_dir=str(tmp_path / "2")))
    assert (wanted.of("ready")[0]["kernels"], child.of("ready")[0]["kernels"]) == ("torch", "liger")
    assert weights_of(child) != weights_of(wanted), "nothing else was computed"
    rel = 1e-2 if config.precision == "bf16" else 1e-4
    for found, other in ((steps, wanted.of("step")), (child.of("evaluated"), wanted.of("evaluated"))):
        assert losses(found) == pytest.approx(losses(other), rel=rel / 10)
    norms = [[step["grad_norm"] for step in one] for one in (steps, wanted.of("step"))]
    assert norms[0] == pytest.approx(norms[1], rel=rel)
    if config.precision == "fp32":
        assert [one.get("exact_match") for one in child.of("evaluated")] == [
            one.get("exact_match") for one in wanted.of("evaluated")
        ]


@pytest.mark.integration
def test_a_run_keeps_the_kernels_that_it_began_with(
    fused: Callable[[], Child], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """Bit for bit, and from torch's it never comes to Liger's; where Liger's are missing it goes on and says so."""
    config = short(tiny_llama, capitals, tmp_path / "1")
    torchs, ligers = train(config), fused()
    with_liger = ligers.run(replace(config, output_dir=str(tmp_path / "2")))

    def resumed(child: Child | None, of: Any, name: str) -> tuple[Any, list[Message]]:
        again = replace(config, output_dir=str(tmp_path / name), resume_from=checkpoint_of(of, 1))
        if child is None:
            wire = train(again)
            return wire, wire.of("step")
        return child, child.run(again)

    child, steps = resumed(fused(), ligers, "3")
    assert numbers(steps) == numbers(with_liger[1:])
    assert child.of("ready")[0]["kernels"] == "liger" and not told(child)
    child, steps = resumed(fused(), torchs, "4")
    assert numbers(steps) == numbers(torchs.of("step")[1:])
    assert child.of("ready")[0]["kernels"] == "torch" and not told(child)
    wire, steps = resumed(None, ligers, "5")
    assert losses(steps) == pytest.approx(losses(with_liger[1:]), rel=1e-5)
    assert wire.of("ready")[0]["kernels"] == "torch"
    assert told(wire) == [
        "Torch's kernels are used: those of Liger need a GPU. The run began with Liger's: its losses may differ in the last digits."
    ]


@pytest.mark.parametrize(
    ("variables", "why"),
    [({}, "those of Liger need a GPU"), ({"TRITON_INTERPRET": "1"}, "the environment lacks liger_kernel")],
    ids=["no GPU", "not installed"],
)
def test_who_asks_for_them_is_told_why_not(
    variables: dict[str, str],
    why: str,
    tiny_llama: Path,
    capitals: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    quiet = train(short(tiny_llama, capitals, tmp_path / "1"))
    wire = train(short(tiny_llama, capitals, tmp_path / "2", use_liger_kernel=True))
    assert (told(quiet), quiet.of("ready")[0]["kernels"]) == ([], "torch")
    assert told(wire)[0].startswith(f"Torch's kernels are used: {why}")
    assert numbers(wire.of("step")) == numbers(quiet.of("step"))


def test_torchs_may_be_asked_for(fused: Callable[[], Child], tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    config = short(tiny_llama, capitals, tmp_path / "1", use_liger_kernel=False)
    child = fused()
    steps = child.run(config)
    assert (told(child), child.of("ready")[0]["kernels"]) == ([], "torch")
    assert numbers(steps) == numbers(train(replace(config, output_dir=str(tmp_path / "2"))).of("step"))


def test_other_architectures_keep_torchs(fused: Callable[[], Child], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", label_rows(4))
    bert = make_tiny_bert(tmp_path / "bert")
    child = fused()
    child.run(short(bert, rows, tmp_path / "1", task="sequence_classification", use_liger_kernel=True))
    assert child.of("ready")[0]["kernels"] == "torch"
    assert told(child) == ["Torch's kernels are used: those of Liger are not used for bert models."]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("raises", "those of Liger fail here (RuntimeError: Failed to find C compiler.)"),
        ("goes forward only", "compute something else here (states are off by 0.0%, gradients by"),
    ],
    ids=["raises", "gradients"],
)
def test_where_they_fail_torchs_are_used(
    kind: str, why: str, on_cpu: dict[str, str], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    config = short(tiny_llama, capitals, tmp_path / "1")
    with zygote(FAULTY.format(kind=kind), **on_cpu) as started:
        child = started.child()
        steps = child.run(replace(config, output_dir=str(tmp_path / "2")))
    assert numbers(steps) == numbers(train(config).of("step"))
    assert child.of("ready")[0]["kernels"] == "torch"
    assert len(told(child)) == 1 and why in told(child)[0]


@pytest.mark.integration
def test_parted_weights_are_as_they_were_where_they_fail(
    on_cpu: dict[str, str], child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """A pass forward and back that DeepSpeed does not lead, before the first step."""
    config = short(tiny_llama, capitals, tmp_path / "1", training_type="full", zero_stage=3, world_size=2)
    with zygote(FAULTY.format(kind="does nothing"), **on_cpu) as started:
        tried = started.child()
        steps = tried.run(replace(config, output_dir=str(tmp_path / "2")))
    assert "states are off by" in told(tried)[0]
    assert numbers(steps) == numbers(child.run(config))


@pytest.mark.integration
@pytest.mark.parametrize(
    "fields",
    [
        {"zero_stage": 0},
        {"zero_stage": 2, "training_type": "full"},
        {"zero_stage": 3},
        {"zero_stage": 3, "training_type": "full", "gradient_checkpointing": True},
    ],
    ids=["stage 0", "stage 2", "stage 3 with an adapter", "stage 3"],
)
def test_two_ranks_with_what_they_share_out(
    fields: dict[str, Any], fused: Callable[[], Child], tiny_llama: Path, capitals: Path, tmp_path: Path
) -> None:
    """Against one rank with torch's."""
    config = short(tiny_llama, capitals, tmp_path / "1", batch_size=4, max_steps=3, **fields)
    wanted, child = train(replace(config, hyperparams=replace(config.hyperparams, zero_stage=0))), fused()
    steps = child.run(replace(config, output_dir=str(tmp_path / "2"), world_size=2))
    assert child.of("ready")[0]["kernels"] == "liger"
    assert losses(steps) == pytest.approx(losses(wanted.of("step")), rel=1e-4)
    norms = [[step["grad_norm"] for step in one] for one in (steps, wanted.of("step"))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
