"""Of the scheduler."""

from __future__ import annotations

from functools import partial

from app.db.scheduler_store import SqlSchedulerStore
from app.settings import SchedulerTimes, load_settings
from app.wiring.database import database
from app.wiring.driver import driver_parts
from cluster.core.job import Node
from cluster.ports import Attempt, SchedulerParts, SchedulerSettings
from trainers.run.launch import RayDriverLauncher
from trainers.run.nursery import Coming
from trainers.run.parts import DriverParts

YIELD_MARGIN_S = 60.0
"""For a driver that kills a child which does not give way; then the scheduler ends the driver."""


def scheduler_parts() -> SchedulerParts:
    settings = load_settings()
    times = settings.scheduler
    store = SqlSchedulerStore(database(settings, size=3), times.max_fruitless_attempts)
    launcher = RayDriverLauncher(driver_parts)
    staged = settings.training.stage_base_models
    return SchedulerParts(
        store,
        launcher,
        scheduler_settings(times),
        partial(upcoming, driver_parts()),
        partial(store.base_models, staged) if staged else None,
    )


def upcoming(parts: DriverParts, attempt: Attempt, node: Node) -> Coming:
    """What a node is told of a job that waits. Raises `HeliostatError`."""
    return Coming(parts.store.upcoming(*attempt, node), parts.settings)


def scheduler_settings(times: SchedulerTimes) -> SchedulerSettings:
    return SchedulerSettings(
        lease_ttl_s=times.lease_ttl_s,
        margin_s=times.margin_s,
        poll_s=times.poll_s,
        stage_limit_s=times.stage_limit_s,
        yield_limit_s=2 * times.yield_grace_s + YIELD_MARGIN_S,
        ahead=times.ahead,
        policy=times.policy(),
    )
