from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from fakes_cluster import NoEnvironments
from waiting import until

from cluster import environment_checks
from cluster.environment_checks import SPREAD_S, EnvironmentChecks, wait_s
from cluster.errors import HeliostatError, Unavailable
from cluster.ports import CheckedEnvironment, EnvironmentCheck, PreparedEnvironment


@dataclass
class Store(NoEnvironments):
    """Environments by what a check of them finds."""

    found: dict[str, CheckedEnvironment | Exception] = field(default_factory=dict)
    problem: HeliostatError | None = None

    def materialize(self, lock: dict[str, object]) -> PreparedEnvironment:
        if self.problem:
            raise self.problem
        return PreparedEnvironment(str(lock["fingerprint"]), Path(), Path(), {"verify": 0.1})

    def ready(self) -> frozenset[str]:
        return frozenset(self.found)

    def check(self, fingerprint: str, *, repair: bool) -> CheckedEnvironment | None:
        found = self.found.get(fingerprint)
        if isinstance(found, Exception):
            raise found
        return found


def said(checks: EnvironmentChecks, *here: str) -> set[tuple[str, str, str, str]]:
    return {(check.fingerprint, check.kind, check.status, check.detail) for check in checks.last(here)}


def test_all_of_them_whatever_one_of_them_has() -> None:
    noted: list[EnvironmentCheck] = []
    store = Store(
        {
            "a": CheckedEnvironment(()),
            "b": Unavailable("it is being used", code="environment_damaged"),
            "c": CheckedEnvironment(tuple(f"f{number}" for number in range(9)), repaired=True),
            "bug": ValueError("what nobody foresaw"),
            "d": CheckedEnvironment(("lib/x.py",)),
        }
    )
    checks = EnvironmentChecks(store, noted.append)
    checks.check_all()
    assert said(checks, "a", "b", "c", "d") == {
        ("a", "full", "ok", ""),
        ("b", "full", "failed", "it is being used"),
        ("c", "full", "repaired", "f0, f1, f2 and 6 more"),
        ("d", "full", "damaged", "lib/x.py"),
    }
    assert [check.fingerprint for check in noted] == ["a", "b", "c", "d"]
    assert said(checks, "a") == {("a", "full", "ok", "")}  # what is not here any more is not told


def test_the_check_before_each_use() -> None:
    store = Store()
    checks = EnvironmentChecks(store)
    checks.prepare({"fingerprint": "a"})
    assert said(checks, "a") == {("a", "quick", "ok", "")}
    store.problem = Unavailable("lib/x.py changed", code="environment_damaged")
    with pytest.raises(Unavailable):
        checks.prepare({"fingerprint": "a"})
    assert said(checks, "a") == {("a", "quick", "damaged", "lib/x.py changed")}  # and nothing here could put it back
    store.problem = Unavailable("no channel", code="environment_channel_failed")
    with pytest.raises(Unavailable):
        checks.prepare({"fingerprint": "b"})
    assert said(checks, "b") == set()


def test_what_is_not_here_has_not_been_checked() -> None:
    checks = EnvironmentChecks(Store())
    assert checks.check("a", repair=False) is None and checks.last(["a"]) == ()


@pytest.mark.parametrize("now", ["02:59:59", "03:00:00", "03:29:00", "03:45:00", "23:00:00"])
def test_once_a_day_and_not_all_at_once(now: str) -> None:
    moment = datetime.fromisoformat(f"2026-11-23T{now}")
    due = {node: wait_s("03:00", node, moment) for node in (f"n{number}" for number in range(50))}
    assert all(0 < seconds <= 24 * 3600 for seconds in due.values())
    starts = {(moment.timestamp() + seconds) % 86400 for seconds in due.values()}
    first = datetime.fromisoformat("2026-11-23T03:00:00").timestamp() % 86400
    assert all(first <= start < first + SPREAD_S for start in starts) and len(starts) > 40
    assert due["n7"] == wait_s("03:00", "n7", moment)


def test_it_is_done_when_it_is_due_whatever_became_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([0.01, 0.01])
    monkeypatch.setattr(environment_checks, "wait_s", lambda at, node, now: next(waits, 86400.0))
    days = iter([OSError("the disk is away")])

    class Away(Store):
        def ready(self) -> frozenset[str]:
            for problem in days:
                raise problem
            return super().ready()

    checks = EnvironmentChecks(Away({"a": CheckedEnvironment(())}))
    checks.start_daily("03:00", "n1")
    until(lambda: said(checks, "a") == {("a", "full", "ok", "")})
