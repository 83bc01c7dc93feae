"""What DeepSpeed is told, and the files in which an optimizer's state waits for any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.child import optimizer
from trainers.child.deepspeed_config import deepspeed_config, zero_stage
from trainers.child.optimizer import Saved, write_state
from trainers.config import Hyperparams, TrainConfig


def config_of(devices: str = "cuda", world_size: int = 2, **hyper: Any) -> TrainConfig:
    return TrainConfig("base", "train", "out", hyperparams=Hyperparams(**hyper), devices=devices, world_size=world_size)


@pytest.mark.parametrize(
    ("size", "hyper", "stage"),
    [
        (1, {}, 0),
        (1, {"zero_stage": 3}, 0),
        (1, {"offload": "optimizer"}, 0),
        (1, {"offload": "parameters"}, 3),
        (2, {}, 2),
        (2, {"zero_stage": 0}, 0),
        (2, {"zero_stage": 1, "offload": "optimizer"}, 1),
        (2, {"offload": "parameters"}, 3),
    ],
)
def test_one_rank_alone_parts_nothing_but_what_it_offloads(size: int, hyper: dict[str, Any], stage: int) -> None:
    assert zero_stage(config_of(world_size=size, **hyper)) == stage


def test_what_is_offloaded_goes_to_the_host() -> None:
    optimizer_only = deepspeed_config(config_of(zero_stage=2, offload="optimizer"), 1, bf16=True)["zero_optimization"]
    all_of_it = deepspeed_config(config_of("cpu", offload="parameters"), 1, bf16=True)["zero_optimization"]
    assert optimizer_only["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in optimizer_only and optimizer_only["reduce_scatter"]
    assert all_of_it["offload_param"] == all_of_it["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_a_large_state_is_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "FILE_BYTES", 100)
    state = [(f"exp_avg/{number}", torch.full((10,), float(number))) for number in range(7)]
    write_state(iter(state), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    with Saved(tmp_path) as saved:
        assert all(torch.equal(saved.read(name), tensor) for name, tensor in state) and "exp_avg/7" not in saved
        with pytest.raises(KeyError):
            saved.read("exp_avg/7")
