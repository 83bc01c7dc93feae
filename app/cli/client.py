"""The HTTP client: one call is tried again while that is safe and useful. It knows paths below `/api/v1`, no commands."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import httpx

from app.cli.contexts import Connection
from app.cli.errors import ServiceError, Unreachable

PASSING = frozenset({429, 502, 503, 504})
"""Answers that may be another one in a moment."""

PAGE = 100


@dataclass(frozen=True)
class Retry:
    """Seconds. `longest_s` bounds a single wait, also one that the service asks for."""

    attempts: int = 5
    first_s: float = 0.25
    longest_s: float = 30.0

    def wait_s(self, attempt: int, response: httpx.Response | None) -> float:
        asked = response.headers.get("retry-after", "") if response is not None else ""
        wait = float(asked) if asked.isdigit() else self.first_s * 2**attempt
        return min(wait, self.longest_s)


def may_retry(response: httpx.Response) -> bool:
    said = response.headers.get("x-should-retry")
    if said is not None:
        return bool(said == "true")
    # A 429 without Retry-After is an allowance that is used up, not a moment's crowd.
    return response.status_code in PASSING and (response.status_code != 429 or "retry-after" in response.headers)


class Client:
    """Every POST carries an Idempotency-Key of its own, so that sending it again creates nothing twice."""

    def __init__(
        self,
        connection: Connection,
        *,
        retry: Retry | None = None,
        notify: Callable[[str], None] = lambda _text: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.connection = connection
        self._retry = retry or Retry()
        self._notify = notify
        self._sleep = sleep
        self._http = httpx.Client(
            base_url=f"{connection.url}/api/v1",
            headers=_headers(connection),
            params=given({"tenant_id": connection.tenant}),
            timeout=httpx.Timeout(60.0, connect=10.0),
            trust_env=not _is_local(connection.url),
        )

    def close(self) -> None:
        self._http.close()

    @property
    def http(self) -> httpx.Client:
        """For streams, which mind their own retries."""
        return self._http

    def get(self, path: str, **params: Any) -> Any:
        return self.call("GET", path, params=given(params)).json()

    def post(self, path: str, body: Any = None, **params: Any) -> Any:
        return _json(self.call("POST", path, json={} if body is None else body, params=given(params)))

    def put(self, path: str, body: Any) -> Any:
        return _json(self.call("PUT", path, json=body))

    def patch(self, path: str, body: Any) -> Any:
        return _json(self.call("PATCH", path, json=body))

    def delete(self, path: str) -> None:
        self.call("DELETE", path)

    def pages(self, path: str, limit: int | None = None, **params: Any) -> list[dict[str, Any]]:
        """Objects of all pages, at most `limit`."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        while True:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = self.get(path, limit=size, after=after, **params)
            found += page["data"]
            if not page.get("has_more") or not page["data"] or (limit is not None and len(found) >= limit):
                return found
            after = page["data"][-1]["id"]

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Raises `ServiceError` and `Unreachable`."""
        headers = dict(options.pop("headers", {}))
        if method == "POST":
            headers.setdefault("Idempotency-Key", str(uuid.uuid4()))
        return self._again(lambda: self._http.request(method, path, headers=headers, **options))

    def upload(self, path: str, request: Callable[[], Mapping[str, Any]]) -> Any:
        """`request` gives data and files afresh for every attempt: a file that was sent in part starts at its beginning."""
        return _json(
            self._again(lambda: self._http.post(path, timeout=httpx.Timeout(600.0, connect=10.0), **request()))
        )

    @contextmanager
    def stream(self, path: str, **params: Any) -> Iterator[httpx.Response]:
        """A long body, once; errors as in `call`."""
        with self._streamed(path, params, self._http.timeout) as response:
            yield response

    @contextmanager
    def download(self, path: str, first_byte_s: float, **params: Any) -> Iterator[httpx.Response]:
        """As `stream`, of what the service makes before it answers."""
        with self._streamed(path, params, httpx.Timeout(first_byte_s, connect=10.0)) as response:
            yield response

    @contextmanager
    def _streamed(self, path: str, params: Mapping[str, Any], timeout: httpx.Timeout) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", path, params=given(params), timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    raise ServiceError.of(response)
                yield response
        except httpx.TransportError as error:
            raise self.unreachable(error) from error

    def _again(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        attempt = 0
        while True:
            response: httpx.Response | None = None
            try:
                response = send()
                problem: str = f"the service answered {response.status_code}"
                if response.is_success:
                    return response
                last = attempt + 1 >= self._retry.attempts or not may_retry(response)
                if last:
                    raise ServiceError.of(response)
            except httpx.TransportError as error:
                problem = str(error) or type(error).__name__
                if attempt + 1 >= self._retry.attempts:
                    raise self.unreachable(error) from error
            wait_s = self._retry.wait_s(attempt, response)
            attempt += 1
            if wait_s >= 1:
                self._notify(f"{problem}; trying again in {wait_s:.0f} s")
            self._sleep(wait_s)

    def unreachable(self, error: httpx.TransportError) -> Unreachable:
        reason = str(error) or type(error).__name__
        return Unreachable(
            f"{self.connection.url} cannot be reached: {reason}",
            hint="is it up? `heliostat status`, `heliostat up`; another address: --url or HELIOSTAT_URL",
        )


def given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if value is not None}


def _json(response: httpx.Response) -> Any:
    return response.json() if response.content else {}


def _headers(connection: Connection) -> dict[str, str]:
    headers = {"User-Agent": f"heliostat/{version('heliostat')}", "Accept": "application/json"}
    if connection.token:
        headers["Authorization"] = f"Bearer {connection.token}"
    return headers


def _is_local(url: str) -> bool:
    """A proxy of the environment has no business with this machine's own addresses."""
    return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
