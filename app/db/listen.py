"""Waiting for NOTIFY on a connection of its own. What happened while nobody was connected is not told: after `wait`
says that it has just connected, look at the rows."""

from __future__ import annotations

import psycopg

from cluster.errors import Unavailable

JOBS = "heliostat"
EVENTS = "heliostat_events"


class Listener:
    """One channel, one connection; for one thread."""

    def __init__(self, dsn: str, channel: str) -> None:
        self._dsn = dsn
        self._channel = channel
        self._connection: psycopg.Connection | None = None

    def wait(self, timeout_s: float) -> list[str] | None:
        """The payloads that arrived (empty: none within the timeout); None, at once, after a new connection: anything
        may have happened before. Raises `Unavailable`."""
        try:
            if self._connection is None:
                self._connect()
                return None
            return self._receive(self._connection, timeout_s)
        except psycopg.OperationalError as error:
            self.close()
            raise Unavailable(
                "the database did not answer while waiting for changes",
                code="database_unavailable",
                hint="Try again in a few seconds.",
            ) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> None:
        self._connection = psycopg.connect(self._dsn, autocommit=True, connect_timeout=5)
        self._connection.execute(f'LISTEN "{self._channel}"'.encode())

    @staticmethod
    def _receive(connection: psycopg.Connection, timeout_s: float) -> list[str]:
        first = [notify.payload for notify in connection.notifies(timeout=timeout_s, stop_after=1)]
        if first:
            first += [notify.payload for notify in connection.notifies(timeout=0)]  # what is here already: one answer
        return first
