"""A few of the kills of `python -m tests.drills.training_kills`, one after the other in one job."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from builders_llama import make_tiny_llama
from training_kills import MOMENTS, NOTICE, STEPS, Kill, KilledJob, draw_kills, run_with_kills


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> KilledJob:
    job = KilledJob(tmp_path_factory.mktemp("alone"), base)
    job.attempt()
    return job


@pytest.mark.integration
def test_a_training_killed_again_and_again_computes_what_an_undisturbed_one_does(
    alone: KilledJob, base: Path, tmp_path: Path
) -> None:
    job = KilledJob(tmp_path, base)
    kills = [Kill("writing", 5, "0"), Kill("evaluation", 14), Kill("upload", 30, "0")]
    hits = list(run_with_kills(job, kills))
    assert hits[0]["half_checkpoint"], "killed inside the writing of a checkpoint"
    assert job.result() == alone.result()


@pytest.mark.integration
def test_a_notice_leaves_a_checkpoint_of_the_last_step_and_nothing_is_computed_twice(
    alone: KilledJob, base: Path, tmp_path: Path
) -> None:
    job = KilledJob(tmp_path, base, checkpoint_every_s=1e9)
    job.attempt(Kill(NOTICE, 11))
    last = max(job.store.steps)
    assert job.store.checkpoints[-1].step == last < STEPS
    job.attempt()
    assert job.result() == alone.result()


def test_kills_are_drawn_from_the_seed_over_all_steps() -> None:
    kills = draw_kills(random.Random(1), MOMENTS, 2)
    assert kills == draw_kills(random.Random(1), MOMENTS, 2) != draw_kills(random.Random(2), MOMENTS, 2)
    assert [kill.moment for kill in kills] == list(MOMENTS)
    assert [kill.after for kill in kills] == sorted(kill.after for kill in kills) and kills[-1].after < STEPS - 2
