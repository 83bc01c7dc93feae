"""Parking: what moves, what stays together, and that no number changes. The mover is the GPU's, here between two places of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders_child import Recorder, make_config, numbers
from builders_methods import train

from trainers.child.park import Mover, Parking, tensors_in
from trainers.child.rank import run_rank
from trainers.protocol import Message

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CPU = torch.device("cpu")


def test_storages_move_once_and_tensors_that_share_one_share_it_afterwards() -> None:
    flat = torch.arange(12.0)
    part, tied = flat[3:9].view(2, 3), flat
    alone = torch.ones(5, dtype=torch.bfloat16, requires_grad=True)
    alone.grad = torch.full((5,), 2.0, dtype=torch.bfloat16)
    tensors = [flat, part, tied, alone, torch.empty(3, device="meta"), torch.empty(0)]
    mover = Mover(lambda: tensors_in({"all": tensors, "none": None}), CPU)
    assert mover.leave() == 12 * 4 + 2 * 5 * 2
    assert [one.untyped_storage().nbytes() for one in (flat, part, alone, alone.grad)] == [0] * 4
    mover.come_back()
    assert flat.tolist() == list(range(12)) and part.tolist() == [[3, 4, 5], [6, 7, 8]]
    assert alone.tolist() == [1] * 5 and alone.grad.tolist() == [2] * 5
    flat[3] = 99.0
    assert part[0, 0] == 99.0 and tied[3] == 99.0, "still one storage"
    assert mover.leave() > 0


def moved_on_cpu(monkeypatch: pytest.MonkeyPatch, moved: list[int]) -> None:
    """Every parking of a run goes through the mover; `moved` gets the bytes."""

    def leave(self: Parking) -> None:
        self._mover = Mover(self.tensors, CPU)  # type: ignore[attr-defined]
        moved.append(self._mover.leave())

    def init(self: Parking, tensors: Any, device: str) -> None:
        self.tensors, self._mover = tensors, None  # type: ignore[attr-defined]
        for tensor in tensors():
            if not tensor.untyped_storage().resizable():  # a weight that lies in its file
                tensor.data = tensor.data.clone()

    monkeypatch.setattr(Parking, "__init__", init)
    monkeypatch.setattr(Parking, "leave", leave)


def twice_parked(message: Message) -> list[Message]:
    """Parked after the second step and, with a checkpoint meanwhile, after the fourth."""
    commands = {2: ["park", "resume"], 4: ["park", "checkpoint", "park", "resume"]}
    wanted = commands.get(message["step"], []) if message["type"] == "step" else []
    return [{"type": "command", "id": number, "command": command} for number, command in enumerate(wanted)]


@pytest.mark.parametrize("kind", [{}, {"training_type": "full", "precision": "bf16"}])
def test_a_run_whose_memory_was_emptied_goes_on_with_the_same_numbers(
    kind: dict[str, Any], tiny_llama: Path, capitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_llama, capitals, tmp_path / "1", max_steps=12, checkpoint_every_s=1e9, **kind)
    undisturbed = train(config)
    moved: list[int] = []
    moved_on_cpu(monkeypatch, moved)
    wire = Recorder(twice_parked)
    run_rank(replace(config, output_dir=str(tmp_path / "2")), 0, 1, wire)
    assert [ack["state"] for ack in wire.of("ack")] == ["parked", "training", "parked", "parked", "parked", "training"]
    assert len(wire.of("checkpoint")) == 2 and wire.of("checkpoint")[0]["step"] >= 4
    assert numbers(wire.of("step")) == numbers(undisturbed.of("step"))
    assert len(moved) == 3 and len(set(moved)) == 1
    parameters = wire.of("ready")[0]["parameters"]
    assert moved[0] >= parameters * (2 + 3 * 4 if kind else 4), "the model, with full training masters and moments too"
    weights = [
        {k: v for k, v in one.of("finished")[0]["sha256"].items() if "safetensors" in k} for one in (wire, undisturbed)
    ]
    assert weights[0] == weights[1]


ZERO = """
import sys, torch, torch.distributed as dist
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForCausalLM
from trainers.child.engine import ZeroEngine
from trainers.child.park import Mover, tensors_of
from trainers.child.world import World
from trainers.config import TrainConfig, Hyperparams

class Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, ids):
        return self.model(ids, labels=ids).loss

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def losses(parks):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
    loss = Loss(model)
    config = TrainConfig("", "", "", hyperparams=Hyperparams(batch_size=1))
    engine = ZeroEngine(loss, config, World(0, 1), 1)
    found = []
    for step in range(4):
        value = loss(torch.arange(5, 25).view(1, 20))
        engine.backward(value, last=True)
        engine.step(1e-2)
        found.append(float(value))
        if parks:
            mover = Mover(lambda: [*tensors_of(model), *engine.tensors()], torch.device("cpu"))
            assert mover.leave() >= 14 * sum(p.numel() for p in model.parameters()), "weights, masters, moments"
            assert all(p.untyped_storage().nbytes() == 0 for p in model.parameters())
            mover.come_back()
    return found
print("losses", losses(False), losses(True), sep=";")
"""


@pytest.mark.integration  # DeepSpeed in a fresh interpreter
def test_zero_goes_on_over_its_flat_views(tiny_llama: Path) -> None:
    root = str(Path(__file__).parents[3])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "LOCAL_RANK": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", ZERO, root, str(tiny_llama)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    _, alone, parked = next(line for line in done.stdout.splitlines() if line.startswith("losses")).split(";")
    assert alone == parked and len(set(alone.strip("[]").split(","))) == 4
