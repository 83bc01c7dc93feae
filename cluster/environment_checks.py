"""What checks have said of a node's environments, by environment and kind, and when the daily check of all of them is due."""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Any

from cluster.errors import HeliostatError
from cluster.ports import CheckedEnvironment, EnvironmentCheck, EnvironmentStore, PreparedEnvironment

SPREAD_S = 1800
"""Nodes that share a disk or a channel do not all begin at once."""
DAMAGED = "environment_damaged"

log = logging.getLogger(__name__)

Note = Callable[[EnvironmentCheck], None]


class EnvironmentChecks:
    """`note` is told of each (metrics). May be used by several threads."""

    def __init__(self, store: EnvironmentStore, note: Note = lambda check: None) -> None:
        self._store = store
        self._note = note
        self._last: dict[tuple[str, str], EnvironmentCheck] = {}

    def last(self, here: Collection[str]) -> tuple[EnvironmentCheck, ...]:
        """The newest of each kind, of these environments."""
        return tuple(check for check in list(self._last.values()) if check.fingerprint in here)

    def prepare(self, lock: dict[str, Any]) -> PreparedEnvironment:
        """Makes it, or finds it and compares sizes and times of its files; what changed is put back first. Raises as the store
        does."""
        try:
            made = self._store.materialize(lock)
        except HeliostatError as error:
            if error.code != DAMAGED:
                raise
            fingerprint = self._store.fingerprint(lock)
            self._keep(EnvironmentCheck(fingerprint, "quick", "damaged", error.message, time.time()))
            try:
                self.check(fingerprint, repair=True)
            except HeliostatError:
                if fingerprint in self._store.ready():
                    raise  # else it was removed, to be made again now
            made = self._store.materialize(lock)
        if "verify" in made.stages:
            self._keep(EnvironmentCheck(made.fingerprint, "quick", "ok", "", time.time()))
        return made

    def check(self, fingerprint: str, *, repair: bool) -> CheckedEnvironment | None:
        """Reads all of it; None: it is not here. Raises `Unavailable`."""
        try:
            found = self._store.check(fingerprint, repair=repair)
        except HeliostatError as error:
            self._keep(EnvironmentCheck(fingerprint, "full", "failed", error.message, time.time()))
            raise
        if found is not None:
            files = ", ".join(found.damaged[:3]) + (
                f" and {len(found.damaged) - 3} more" if len(found.damaged) > 3 else ""
            )
            self._keep(EnvironmentCheck(fingerprint, "full", found.status, files, time.time()))
        return found

    def check_all(self) -> None:
        """And puts back what changed, in each, whatever becomes of another."""
        for fingerprint in sorted(self._store.ready()):
            try:
                self.check(fingerprint, repair=True)
            except HeliostatError as error:
                log.warning("environment %s could not be checked: %s", fingerprint, error)
            except Exception:
                log.exception("environment %s could not be checked", fingerprint)

    def start_daily(self, at: str, node: str) -> None:
        threading.Thread(target=self._daily, args=(at, node), name="daily-check", daemon=True).start()

    def _daily(self, at: str, node: str) -> None:
        while True:
            time.sleep(wait_s(at, node, datetime.now()))
            try:
                self.check_all()
            except Exception:  # tomorrow is another day: without this thread nothing is ever checked again
                log.exception("the environments of this node could not be checked")

    def _keep(self, check: EnvironmentCheck) -> None:
        self._last[check.fingerprint, check.kind] = check
        self._note(check)


def wait_s(at: str, node: str, now: datetime) -> float:
    """Until the next `HH:MM` of the node's clock, and some minutes more that are the node's own."""
    hour, minute = (int(part) for part in at.split(":"))
    due = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    due += timedelta(seconds=zlib.crc32(node.encode()) % SPREAD_S)
    while due <= now:
        due += timedelta(days=1)
    return (due - now).total_seconds()
