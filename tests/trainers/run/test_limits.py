"""What ends an attempt: run time, budget, quota; also while the database does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from cluster.core.job import JobState
from cluster.errors import Unavailable
from trainers.run.limits import ASK_EVERY_S, Limits
from trainers.run.ports import Allowance, Assignment, DriverStore


@dataclass
class Rows:
    """What the database says; `down`: it does not."""

    says: Allowance | None = None
    down: bool = False
    asked: int = 0

    def allowance(self, job_id: str, attempt: int) -> Allowance | None:
        self.asked += 1
        if self.down:
            raise Unavailable("the database is down")
        return self.says


def limits(rows: Rows) -> Limits:
    return Limits(cast(DriverStore, rows))


def assignment(max_runtime_s: float | None = None) -> Assignment:
    made = object.__new__(Assignment)
    for name, value in {"job_id": "j", "attempt": 1, "max_runtime_s": max_runtime_s}.items():
        object.__setattr__(made, name, value)
    return made


def test_without_a_limit_it_goes_on() -> None:
    assert limits(Rows()).reached(assignment(), 1e9) is None


def test_the_run_time_counts_over_all_attempts() -> None:
    one = limits(Rows())
    assert one.reached(assignment(60.0), 59.9) is None
    ended = one.reached(assignment(60.0), 60.0)
    assert ended is not None and ended.state is JobState.FAILED
    assert ended.error is not None and ended.error["code"] == "max_runtime_reached"


@pytest.mark.parametrize(("code", "hint"), [("budget_reached", "larger"), ("quota_exceeded", "next month")])
def test_what_is_used_up_pauses_and_says_why(code: str, hint: str) -> None:
    ended = limits(Rows(Allowance(0.0, code, "2 GPU-hours"))).reached(assignment(), 0.0)
    assert ended is not None and ended.state is JobState.PAUSED
    assert ended.error is not None and ended.error["code"] == code
    assert ended.reason.startswith(code) and "2 GPU-hours" in ended.reason
    assert hint in (ended.error["hint"] or "")


def test_between_two_answers_it_counts_on_by_itself() -> None:
    rows = Rows(Allowance(4.0, "budget_reached", "1 USD"))
    one = limits(rows)
    assert one.reached(assignment(), 100.0) is None
    assert one.reached(assignment(), 103.9) is None
    assert one.reached(assignment(), 104.0) is not None
    assert rows.asked == 1


def test_a_new_answer_takes_the_place_of_the_old_one() -> None:
    rows = Rows(Allowance(ASK_EVERY_S + 1, "quota_exceeded", "9 GPU-hours a month"))
    one = limits(rows)
    assert one.reached(assignment(), 0.0) is None
    rows.says = None  # an operator took the limit away
    assert one.reached(assignment(), ASK_EVERY_S) is None
    assert one.reached(assignment(), 2 * ASK_EVERY_S - 1) is None
    rows.says = Allowance(-5.0, "quota_exceeded", "1 GPU-hours a month")
    assert one.reached(assignment(), 2 * ASK_EVERY_S) is not None


def test_while_the_database_is_down_the_last_answer_counts() -> None:
    rows = Rows(Allowance(25.0, "budget_reached", "1 GPU-hours"))
    one = limits(rows)
    assert one.reached(assignment(), 0.0) is None
    rows.down = True
    assert one.reached(assignment(), 24.9) is None
    assert one.reached(assignment(), 25.0) is not None


def test_a_database_that_never_answered_stops_nobody() -> None:
    one = limits(Rows(down=True))
    assert all(one.reached(assignment(), float(second)) is None for second in range(30))
