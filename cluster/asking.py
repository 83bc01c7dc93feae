"""Questions to the outside (actors that may be slow or gone), asked side by side and never twice at a time: who asks gets the
answer when it is there, and is woken then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from cluster.errors import HeliostatError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Pending:
    """No answer yet."""


PENDING = Pending()


class Inline(Executor):
    """Answers at once, in the caller's thread: for tests, and where one question at a time will do."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except HeliostatError as error:
            future.set_exception(error)
        return future


class Asking:
    """For one thread. `wake` is called from any. A question that failed is not asked again before `retry_s` are over."""

    def __init__(self, pool: Executor, wake: Callable[[], None], clock: Callable[[], float], retry_s: float) -> None:
        self._pool = pool
        self._wake = wake
        self._clock = clock
        self._retry_s = retry_s
        self._open: dict[Hashable, Future[Any]] = {}
        self._not_before: dict[Hashable, float] = {}

    def ask(self, key: Hashable, call: Callable[[], T]) -> T | Pending:
        """The answer, once; then the question can be asked again. What went wrong is logged: no answer."""
        if key not in self._open:
            if self._clock() < self._not_before.get(key, 0.0):
                return PENDING
            self._open[key] = self._pool.submit(call)
            if not self._open[key].done():
                self._open[key].add_done_callback(lambda _: self._wake())
        return self._answer(key) if self._open[key].done() else PENDING

    def is_open(self, key: Hashable) -> bool:
        """Whether it was asked and the answer was not taken yet."""
        return key in self._open

    def put_off(self, key: Hashable) -> None:
        """The answer was not what was hoped for: the same question waits a while."""
        self._not_before[key] = self._clock() + self._retry_s

    def forget(self, over: Callable[[Hashable], bool]) -> None:
        """Drops what is known of questions that nobody will ask again."""
        self._not_before = {key: at for key, at in self._not_before.items() if not over(key)}
        for key in [key for key, answer in self._open.items() if answer.done() and over(key)]:
            del self._open[key]

    def _answer(self, key: Hashable) -> Any:
        self._not_before.pop(key, None)
        try:
            return self._open.pop(key).result()
        except HeliostatError as error:
            log.warning("%s: %s", key, error)
            self.put_off(key)
            return PENDING
