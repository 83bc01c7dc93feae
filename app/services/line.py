"""The line as the scheduler sees it, over all tenants: who waits, who holds what, why, and until when. Services show of it what
their caller may see."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from app.db.scheduler_rows import read_nodes, read_rows
from app.db.session import Database
from app.services.forecasts import Forecast, Forecasts
from app.services.kept import Kept
from cluster.core.explain import Explanation, explain_all
from cluster.core.job import ACTIVE, Job, JobState
from cluster.core.policy import Policy
from cluster.core.slices import Holding
from cluster.core.state import ClusterState, Snapshot
from cluster.facts import snapshot_of
from cluster.ports import ActiveJob, Rows

UNFINISHED = ACTIVE | {JobState.RECOVERING, JobState.SUSPENDED}


class Look:
    """One moment. `snapshot.waiting` is in order; parked jobs are among `snapshot.held`."""

    def __init__(self, rows: Rows, state: ClusterState) -> None:
        self.now = rows.now
        self.snapshot = state.snapshot()
        self.active: dict[str, ActiveJob] = {one.id: one for one in rows.active if one.state in UNFINISHED}
        self._state = state
        self._explaining = threading.Lock()  # the state machine is for one thread

    def explain(self, job_ids: Iterable[str]) -> dict[str, Explanation]:
        """Of those that wait."""
        with self._explaining:
            return explain_all(self._state, job_ids, self.now)

    def positions(self) -> dict[str, int]:
        """Job → its place in the line; 1 is the next."""
        return {job.id: place for place, job in enumerate(self.snapshot.waiting, start=1)}

    def waiting(self) -> list[Job]:
        """Parked ones too."""
        return [*self.snapshot.waiting, *(one.job for one in self.snapshot.held.values() if one.parked)]

    def held(self, job_id: str) -> Holding | None:
        """What an unfinished job holds."""
        active = self.active.get(job_id)
        return self.snapshot.held.get(active.key) if active else None

    def unfinished(self) -> Snapshot:
        """Without what has ended and is still leaving."""
        held = {key: one for key, one in self.snapshot.held.items() if one.job.id in self.active}
        return replace(self.snapshot, held=held)


class LineService:
    """`look` and `forecast` raise `Unavailable`."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy
        self._forecasts = Forecasts(database, policy)
        self._looks = Kept(self._look)
        self._foretold = Kept(self._forecast)

    def look(self) -> Look:
        return self._looks.get()

    def forecast(self) -> Forecast:
        return self._foretold.get()

    def _look(self) -> Look:
        with self._database.snapshot() as session:
            rows, nodes = read_rows(session), read_nodes(session)
        return Look(rows, ClusterState.rebuilt(snapshot_of(rows, nodes), self._policy))

    def _forecast(self) -> Forecast:
        look = self._looks.get()
        return self._forecasts.of(look.unfinished(), look.now)
