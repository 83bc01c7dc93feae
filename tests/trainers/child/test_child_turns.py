"""A few of the switches of `python -m tests.drills.parking`; and that who is parked computes nothing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from builders_child import Child, Zygote, make_config
from parking import MOMENTS, idle_cpu_s, take_turns
from waiting import until

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("ranks", [1, 2])
def test_two_trainings_alternate_and_compute_what_each_does_alone(ranks: int, _zygote: Zygote, tmp_path: Path) -> None:
    turns = take_turns(_zygote, tmp_path, ranks, len(MOMENTS), random.Random(ranks))
    assert {one["moment"] for one in turns.switches} == set(MOMENTS)


def test_who_is_parked_gives_the_cores_back(child: Child, tiny_llama: Path, capitals: Path, tmp_path: Path) -> None:
    child.start(make_config(tiny_llama, capitals, tmp_path, max_steps=100_000, checkpoint_every_s=1e9))
    child.until("step")
    assert child.command("park")["state"] == "parked"
    until(lambda: idle_cpu_s(child, seconds=1.0) <= 0.02)  # it may still be at the end of its last word
