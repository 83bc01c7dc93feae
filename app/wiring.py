"""Joins the packages: each function makes the parts of one process from the settings. Ray ships only the functions' names; files
and variables on the node say the rest, so that no secret travels."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI

from app.auth.issuer import Issuer
from app.auth.verify import make_verifier
from app.db.job_store import SqlJobStore
from app.db.scheduler_store import SqlSchedulerStore
from app.db.session import Database, PoolSettings
from app.environment_places import conda_places, disk_budget, from_storage, pip_index
from app.importer import ImporterParts
from app.settings import SchedulerTimes, Settings, load_settings
from cluster.client import check_environment
from cluster.core.job import Node
from cluster.errors import EnvironmentError_, HeliostatError
from cluster.ports import (
    AgentParts,
    Attempt,
    CheckedEnvironment,
    NodeSettings,
    PreparedEnvironment,
    SchedulerParts,
    SchedulerSettings,
)
from cluster.storage.objects import ObjectStore
from runtime_envs.environments import Environments
from runtime_envs.environments import solve_environment as solve
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.fingerprint import identity
from runtime_envs.lock import Solved
from runtime_envs.sandbox.cgroup import sweep
from runtime_envs.sandbox.spec import Isolation
from trainers.run.launch import RayDriverLauncher
from trainers.run.nursery import Coming, Nursery
from trainers.run.parts import DriverParts, DriverSettings

HTTP_STATEMENT_TIMEOUT_S = 30.0
YIELD_MARGIN_S = 60.0
"""For a driver that kills a child which does not give way; then the scheduler ends the driver."""


def database(settings: Settings, *, statement_timeout_s: float | None = None, size: int | None = None) -> Database:
    if settings.database.dsn is None:
        raise HeliostatError(
            "no database is configured for this process",
            code="database_missing",
            hint="Processes are started by `heliostat up`, or name a server: HELIOSTAT_DATABASE__DSN.",
        )
    pool = PoolSettings(size=size or settings.database.pool_size, statement_timeout_s=statement_timeout_s)
    return Database(settings.database.dsn, pool)


def http_app() -> FastAPI:
    """Of an API replica."""
    from app.main import AppParts, create_app  # its routes take seconds to build: only the replica needs them

    settings = load_settings()
    rows = database(settings, statement_timeout_s=HTTP_STATEMENT_TIMEOUT_S)
    parts = AppParts(
        settings=settings,
        database=rows,
        storage=ObjectStore(settings.objects_url),
        solve=partial(solve_environment, settings),
        check_environment=check_environment,
        verifier=make_verifier(settings, rows),
        issuer=Issuer(settings, rows) if settings.auth.builtin else None,
    )
    return create_app(parts, under_serve=True)


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


def agent_parts() -> AgentParts:
    sweep()
    settings = load_settings()
    node = settings.node
    return AgentParts(
        NodeEnvironments(node_environments(settings)),
        NodeSettings(
            settings.node_root,
            settings.objects_url,
            full_check_at=settings.environments.full_check_at,
            **node.model_dump(),
        ),
        Nursery() if settings.training.start_early else None,
    )


def importer_parts() -> ImporterParts:
    settings = load_settings()
    return ImporterParts(database(settings, size=2), ObjectStore(settings.objects_url), settings)


def solve_environment(settings: Settings, text: str) -> Solved:
    """environment.yml → lock. Raises `EnvironmentError_`."""
    try:
        return solve(text, conda_places(settings))
    except EnvironmentProblem as problem:
        raise of_the_house(problem) from problem


def node_environments(settings: Settings) -> Environments:
    """Of this machine."""
    fetch = from_storage(ObjectStore(settings.objects_url))
    return Environments(settings.node_root, pip_index(settings), disk_budget(settings), fetch)


class NodeEnvironments:
    """`cluster.ports.EnvironmentStore` over `runtime_envs`, which knows nothing of the cluster's errors."""

    def __init__(self, environments: Environments) -> None:
        self._environments = environments

    def materialize(self, lock: dict[str, Any]) -> PreparedEnvironment:
        try:
            made = self._environments.materialize(lock)
        except EnvironmentProblem as problem:
            raise of_the_house(problem) from problem
        return PreparedEnvironment(made.fingerprint, made.prefix, made.python, made.stages)

    def fingerprint(self, lock: dict[str, Any]) -> str:
        return identity(lock)

    def ready(self) -> frozenset[str]:
        return self._environments.ready()

    def check(self, fingerprint: str, *, repair: bool) -> CheckedEnvironment | None:
        if fingerprint not in self.ready():
            return None
        try:
            if not repair:
                return CheckedEnvironment(tuple(self._environments.verify(fingerprint, full=True)))
            done = self._environments.repair(fingerprint)
        except EnvironmentProblem as problem:
            raise of_the_house(problem) from problem
        return CheckedEnvironment(done.files, bool(done.files), done.environments)


def of_the_house(problem: EnvironmentProblem) -> EnvironmentError_:
    return EnvironmentError_(
        problem.message,
        code=problem.code,
        param="environment",
        hint=problem.hint,
        fixable_by=problem.fixable_by,
    )
