"""Server-sent events that outlive their connection: after a break it asks for what came after the last event it has seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, SSEError, connect_sse

from app.cli.client import Client, given
from app.cli.errors import ServiceError, Unreachable

SILENCE_S = 60.0
"""The service sends a comment at least every 15 s; a connection that says nothing for so long is dead."""

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True)
class Patience:
    """`most_s`: so long without any contact, and we give up."""

    most_s: float = 600.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class EventStream:
    """`read` yields events until the service closes the stream properly; `last_id` then says how far we are."""

    def __init__(
        self, client: Client, path: str, *, lost: Callable[[str], None], patience: Patience | None = None
    ) -> None:
        self.last_id: str | None = None
        self._client = client
        self._path = path
        self._lost = lost
        self._patience = patience or Patience()

    def read(self, **params: Any) -> Iterator[dict[str, Any]]:
        """Raises `Unreachable` after `Patience.most_s` without contact, `ServiceError` for a refusal."""
        broken_since: float | None = None
        failures = 0
        while True:
            try:
                for event in self._connect(params):
                    broken_since = None
                    if event is not None:
                        failures = 0
                        self.last_id = event.id or self.last_id
                        yield json.loads(event.data)
                return
            except (httpx.TransportError, SSEError) as error:
                reason = str(error) or type(error).__name__
            except ServiceError as error:
                if error.status < 500:
                    raise
                reason = error.message
            broken_since = broken_since or self._patience.clock()
            self._pause(reason, failures, self._patience.clock() - broken_since)
            failures += 1

    def _pause(self, reason: str, failures: int, silent_s: float) -> None:
        if silent_s > self._patience.most_s:
            raise Unreachable(f"no contact for {silent_s:.0f} s: {reason}", hint="what runs there goes on without us")
        if failures == 0:
            self._lost(reason)
        self._patience.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])

    def _connect(self, params: dict[str, Any]) -> Iterator[ServerSentEvent | None]:
        """None: connected."""
        headers = {"Last-Event-ID": self.last_id} if self.last_id else {}
        timeout = httpx.Timeout(SILENCE_S, connect=10.0)
        with connect_sse(
            self._client.http, "GET", self._path, params=given(params), headers=headers, timeout=timeout
        ) as source:
            if source.response.is_error:
                source.response.read()
                raise ServiceError.of(source.response)
            yield None
            yield from (event for event in source.iter_sse() if event.data)
