from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from fakes_cluster import ManualClock
from waiting import PATIENCE_S, until

from cluster.asking import PENDING, Asking, Inline
from cluster.errors import Unavailable
from cluster.inbox import Inbox


def asking(clock: ManualClock | None = None) -> Asking:
    return Asking(Inline(), lambda: None, clock or ManualClock(), retry_s=2.0)


def test_an_answer_is_given_once_and_the_question_can_be_asked_again() -> None:
    answers = iter([1, 2])
    questions = asking()
    assert [questions.ask("q", lambda: next(answers)) for _ in range(2)] == [1, 2]


def test_a_question_is_open_once_and_its_answer_wakes_who_asked() -> None:
    hold, calls, woken = threading.Event(), [], threading.Event()

    def slow() -> str:
        calls.append(1)
        hold.wait(PATIENCE_S)
        return "late"

    with ThreadPoolExecutor(4) as pool:
        questions = Asking(pool, woken.set, ManualClock(), retry_s=2.0)
        assert [questions.ask("q", slow) for _ in range(3)] == [PENDING] * 3
        assert questions.is_open("q") and not woken.is_set()
        hold.set()
        until(woken.is_set)
        assert (questions.ask("q", slow), len(calls)) == ("late", 1)


def test_what_failed_is_asked_again_only_after_a_while() -> None:
    clock, calls = ManualClock(), []

    def fails() -> None:
        calls.append(1)
        raise Unavailable("it is away")

    questions = asking(clock)
    assert [questions.ask("q", fails) for _ in range(3)] == [PENDING] * 3
    assert len(calls) == 1
    clock.advance(2.0)
    questions.ask("q", fails)
    assert len(calls) == 2


def test_an_answer_that_was_not_hoped_for_can_be_put_off() -> None:
    clock = ManualClock()
    questions = asking(clock)
    assert questions.ask("q", lambda: False) is False
    questions.put_off("q")
    assert questions.ask("q", lambda: True) is PENDING
    clock.advance(2.0)
    assert questions.ask("q", lambda: True) is True


def test_what_nobody_asks_again_is_forgotten() -> None:
    with ThreadPoolExecutor(1) as pool:
        questions = Asking(pool, lambda: None, ManualClock(), retry_s=2.0)
        questions.ask("gone", lambda: 1)
        questions.ask("kept", lambda: 1)
        until(lambda: all(answer.done() for answer in questions._open.values()))
        questions.put_off("gone")
        questions.forget(lambda key: key == "gone")
        assert not questions.is_open("gone") and questions.is_open("kept")
        assert questions._not_before == {}


def test_the_inbox_begins_with_everything_and_gathers_what_comes() -> None:
    inbox = Inbox()
    assert inbox.take() is None
    inbox.put(frozenset({"a"}))
    inbox.remember({"b"})
    assert inbox.take() == {"a", "b"}
    inbox.put(frozenset({"a"}))
    inbox.put(None)
    inbox.put(frozenset({"c"}))
    assert inbox.take() is None
    assert inbox.take() == frozenset()


def test_only_news_wake_the_loop() -> None:
    inbox = Inbox()
    inbox.take()
    inbox.put(frozenset())
    inbox.remember({"a"})
    assert not inbox._woken.is_set()
    inbox.put(frozenset({"b"}))
    inbox.wait(10)  # returns at once, or the test's time runs out
    assert inbox.take() == {"a", "b"}
