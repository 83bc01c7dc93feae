"""Cheap values are always fresh; dear ones serve for a while; who comes meanwhile shares the next one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from waiting import PATIENCE_S

from app.services.kept import CHEAP_S, KEPT, Kept


class Counter:
    """Each value takes `cost_s` of its own clock."""

    def __init__(self, cost_s: float) -> None:
        self.cost_s, self.now, self.made = cost_s, 0.0, 0

    def work_out(self) -> int:
        self.now += self.cost_s
        self.made += 1
        return self.made

    def clock(self) -> float:
        self.now += 1e-6
        return self.now


def test_a_cheap_value_is_fresh() -> None:
    counter = Counter(CHEAP_S / 2)
    kept = Kept(counter.work_out, counter.clock, counter.clock)
    assert [kept.get() for _ in range(3)] == [1, 2, 3]


def test_a_dear_value_serves_for_a_while() -> None:
    counter = Counter(1.0)
    kept = Kept(counter.work_out, counter.clock, counter.clock)
    assert [kept.get() for _ in range(3)] == [1, 1, 1]
    counter.now += KEPT * 1.1
    assert kept.get() == 2


def test_those_who_wait_share_one_that_began_after_they_asked() -> None:
    began, go_on, made = threading.Event(), threading.Event(), []

    def work_out() -> int:
        made.append(1)
        began.set()
        assert go_on.wait(PATIENCE_S)
        return len(made)

    kept = Kept(work_out)
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(kept.get)
        assert began.wait(PATIENCE_S)
        others = [pool.submit(kept.get) for _ in range(5)]
        go_on.set()
        assert first.result() == 1
        assert {other.result() for other in others} <= {1, 2}
    assert len(made) <= 2
