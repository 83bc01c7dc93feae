"""Run times foretold: calibrated on worlds whose law is known, conditional on service, deterministic."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.estimates import (
    OUTLOOK,
    Estimator,
    Traits,
    mean_remaining,
    quantile,
    remaining,
    spread,
)

HOUR = 3600.0
SIZES = st.sampled_from([1, 2, 8])
RUN_S = st.floats(1, 5e6)


def traits(tenant: str = "a", slots: int = 1, expected_s: float | None = None) -> Traits:
    return Traits(tenant, slots, "m", expected_s)


def taught(*runs: tuple[Traits, float]) -> Estimator:
    estimator = Estimator()
    for one, run_s in runs:
        estimator.learn(one, run_s)
    return estimator


def below(draw: Callable[[random.Random], float], q: float, asked: Traits, attained_s: float = 0.0) -> float:
    """How often the truth lay below the foretold quantile of the time left, in the later half of 1,000 jobs."""
    chance, estimator, hits, judged = random.Random(7), Estimator(), 0, 0
    for number in range(1000):
        run_s = draw(chance)
        outlook = estimator.outlook(asked, attained_s, str(number))
        if number >= 500 and run_s > attained_s:
            left = quantile(outlook, q, attained_s)
            assert left is not None
            hits, judged = hits + (run_s - attained_s <= left), judged + 1
        estimator.learn(asked, run_s, str(number))
    return hits / judged


def test_nothing_is_known_before_a_job_has_ended() -> None:
    assert Estimator().outlook(traits()) == ()
    assert quantile((), 0.5) is None
    assert mean_remaining((), 0.0) is None


def test_a_known_work_is_an_outlook_of_its_own() -> None:
    outlook = Estimator().outlook(traits(expected_s=1000.0))
    assert quantile(outlook, 0.5) == pytest.approx(1000, rel=0.05)
    assert 1100 < (quantile(outlook, 0.8) or 0) < 1700


def test_the_ratio_of_truth_to_the_worked_out_time_is_learnt() -> None:
    estimator = taught(*[(traits(expected_s=100.0 * (1 + n % 5)), 150.0 * (1 + n % 5)) for n in range(40)])
    outlook = estimator.outlook(traits(expected_s=2000.0))
    assert quantile(outlook, 0.5) == pytest.approx(3000, rel=0.05)
    assert (quantile(outlook, 0.8) or 0) < 3600


@pytest.mark.parametrize("q", [0.5, 0.8])
def test_quantiles_cover_what_they_say(q: float) -> None:
    assert below(lambda chance: math.exp(chance.gauss(7, 1.5)), q, traits()) == pytest.approx(q, abs=0.06)


def test_time_left_is_foretold_from_the_time_that_it_has_run() -> None:
    def two_kinds(chance: random.Random) -> float:
        return chance.uniform(50, 100) if chance.random() < 0.8 else chance.uniform(10 * HOUR, 20 * HOUR)

    assert below(two_kinds, 0.8, traits(), attained_s=HOUR) == pytest.approx(0.8, abs=0.1)
    estimator = taught(*[(traits(), 70.0 if number % 5 else 15 * HOUR) for number in range(100)])
    fresh, old = (quantile(estimator.outlook(traits(), ran), 0.5, ran) for ran in (0.0, HOUR))
    assert fresh is not None and fresh < 100
    assert old is not None and old > 10 * HOUR


def test_a_tenant_is_known_by_its_own_jobs() -> None:
    estimator = taught(
        *[(traits(tenant), run_s) for _ in range(30) for tenant, run_s in (("a", 60.0), ("b", 9 * HOUR))]
    )
    short, long = (quantile(estimator.outlook(traits(tenant)), 0.5) for tenant in "ab")
    assert short == pytest.approx(60, rel=0.3)
    assert long == pytest.approx(9 * HOUR, rel=0.3)


def test_so_is_a_gang_of_another_size() -> None:
    estimator = taught(*[(traits("a", slots), run_s) for _ in range(30) for slots, run_s in ((1, 60.0), (8, 9 * HOUR))])
    assert (quantile(estimator.outlook(traits("a", 8)), 0.5) or 0) > 5 * HOUR
    assert (quantile(estimator.outlook(traits("new", 8)), 0.5) or 0) > HOUR, "a new tenant is judged by the size"


def test_a_change_of_habit_is_followed() -> None:
    estimator = taught(*[(traits(), 10 * HOUR)] * 300)
    for _ in range(30):
        estimator.learn(traits(), 100.0)
    assert (quantile(estimator.outlook(traits()), 0.5) or 0) < HOUR


def test_experts_are_judged_by_what_they_said_when_asked() -> None:
    """A sweep of 50 like jobs is asked for at once: that the 49 before it told the 50th's length is no merit."""
    hindsight, honest = Estimator(), Estimator()
    chance = random.Random(3)
    for sweep in range(20):
        run_s = math.exp(chance.gauss(7, 2))
        for number in range(50):
            honest.outlook(traits(), job_id=f"{sweep}-{number}")
        for number in range(50):
            honest.learn(traits(), run_s, f"{sweep}-{number}")
            hindsight.learn(traits(), run_s)
    narrow, wide = ((quantile(one.outlook(traits()), 0.8) or 0) for one in (hindsight, honest))
    assert wide > 1.5 * narrow


def test_a_cancelled_job_teaches_nothing() -> None:
    one, other = taught((traits(), 100.0)), taught((traits(), 100.0))
    one.outlook(traits(), job_id="x")
    one.forget("x")
    assert one.outlook(traits()) == other.outlook(traits())


@given(st.lists(st.tuples(st.sampled_from("ab"), SIZES, RUN_S), min_size=1, max_size=12), RUN_S, SIZES)
def test_an_outlook_is_sorted_and_beyond_what_was_attained(
    ended: list[tuple[str, int, float]], attained_s: float, slots: int
) -> None:
    runs = [(traits(tenant, size), run_s) for tenant, size, run_s in ended]
    for estimator in (taught(*runs), taught(*runs)):
        outlook = estimator.outlook(traits("a", slots), attained_s)
        assert len(outlook) == OUTLOOK
        assert list(outlook) == sorted(outlook)
        assert outlook[0] >= attained_s
        assert all(math.isfinite(run_s) for run_s in outlook)
    assert taught(*runs).outlook(traits("a", slots)) == taught(*runs).outlook(traits("a", slots))


@given(st.lists(RUN_S, min_size=1, max_size=15).map(sorted), st.floats(0, 1e7))
def test_time_left_is_never_nothing(outlook: list[float], attained_s: float) -> None:
    left = remaining(outlook, attained_s)
    assert left and all(one >= 0 for one in left) and list(left) == sorted(left)
    half, most = (quantile(outlook, q, attained_s) for q in (0.5, 0.8))
    assert half is not None and most is not None and half <= most


def test_who_has_outrun_all_that_is_known_may_run_as_long_again() -> None:
    assert quantile((10.0, 20.0), 0.5, 100.0) == pytest.approx(100.0)
    assert mean_remaining((10.0, 30.0), 10.0) == pytest.approx(20.0)
    estimator = taught((traits(), 50.0))
    assert quantile(estimator.outlook(traits(), 1e8), 0.5, 1e8) == pytest.approx(1e8, rel=0.01)


def test_steps_that_are_left_are_known_within_their_pace() -> None:
    outlook = spread(600.0, 1000.0)
    assert quantile(outlook, 0.5, 600.0) == pytest.approx(1000.0)
    assert 1050 < (quantile(outlook, 0.8, 600.0) or 0) < 1150
    assert set(spread(600.0, 0.0)) == {600.0}
