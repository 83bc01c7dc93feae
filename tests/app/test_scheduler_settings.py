"""What an operator sets for the scheduler reaches it."""

from __future__ import annotations

from dataclasses import fields

import pytest

from app.settings import SchedulerTimes
from cluster.core.policy import Policy

SHARED = sorted({one.name for one in fields(Policy)} & set(SchedulerTimes.model_fields))


@pytest.mark.parametrize("name", SHARED)
def test_each_setting_that_the_policy_has_is_its(name: str) -> None:
    asked = getattr(SchedulerTimes(), name) + 7.0
    assert getattr(SchedulerTimes(**{name: asked}).policy(), name) == asked


def test_they_are_those_that_operators_know() -> None:
    assert SHARED == ["look_s", "min_run_s", "park_max_s", "quantum_s", "reserve_after_s"]
