"""A two-slot job survives SIGKILL of its parts with the same loss at every step. `make drill` has all targets and many steps."""

from __future__ import annotations

import pytest
from heliostat_service import Service, rows, upload
from kills import StepLoss, check_same, run_undisturbed, run_with_kill

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[StepLoss]:
    upload(service.client(), "colours", rows(64))
    return run_undisturbed(service)


@pytest.mark.parametrize(("target", "step"), [("child", 12), ("driver", 25), ("postgres", 40)])
def test_a_killed_part_changes_no_number(service: Service, undisturbed: list[StepLoss], target: str, step: int) -> None:
    _, disturbed = run_with_kill(service, target, step)
    check_same(undisturbed, disturbed)
