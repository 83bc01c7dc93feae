"""Of the driver of a job: each job starts one, and waits for its imports."""

from __future__ import annotations

from app.db.job_store import SqlJobStore
from app.settings import load_settings
from app.wiring.database import database
from runtime_envs.sandbox.spec import Isolation
from trainers.run.parts import DriverParts, DriverSettings


def driver_parts() -> DriverParts:
    settings = load_settings()
    return DriverParts(
        SqlJobStore(database(settings, size=3)),
        DriverSettings(
            storage_url=settings.objects_url,
            lease_ttl_s=settings.scheduler.lease_ttl_s,
            checkpoint_every_s=settings.training.checkpoint_every_s,
            exact_match_rows=settings.training.exact_match_rows,
            yield_grace_s=settings.scheduler.yield_grace_s,
            isolation=Isolation(settings.isolation),
            sandbox=settings.sandbox.limits(),
        ),
    )
