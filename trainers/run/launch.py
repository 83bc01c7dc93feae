"""Starts, finds and ends the drivers of jobs: detached Ray actors on control nodes, one for each attempt."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import ray
from ray.exceptions import RayActorError, RayError, RaySystemError

from cluster.errors import HeliostatError, Unavailable
from trainers.run.actors import NAMESPACE, RayAgents, driver_name, kill_actor
from trainers.run.driver import JobDriver
from trainers.run.gang import RayGang
from trainers.run.parts import DriverParts, Order, Record, WorkerTask

log = logging.getLogger(__name__)

Wiring = Callable[[], DriverParts]

CONTROL_RESOURCE = {"heliostat_control": 0.001}
CONCURRENCY = 32
"""`run`, pings, and a relay of each node's worker, which takes no time."""

TRAIN_VARIABLES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Train's defaults: poll every 2 s, ten minutes for a hanging worker, one for the start of a group; the watcher of
preemptions is another process for each job, and the agents watch for those."""

_PING_S = 2.0


class DriverActor:
    """A `JobDriver` as an actor. The dashboard shows its `repr`: whose job it is."""

    def __init__(self, job_id: str, attempt: int, wiring: Wiring) -> None:
        parts = wiring()
        self._driver = JobDriver(job_id, attempt, parts, RayAgents(), RayGang(job_id, attempt))
        self._running = threading.Lock()
        self._name = _display_name(job_id, attempt, parts)

    def __repr__(self) -> str:
        return self._name

    def run(self) -> None:
        """A second call returns at once: starting is idempotent. The actor leaves when the attempt is over."""
        if not self._running.acquire(blocking=False):
            return
        try:
            self._driver.run()
        finally:
            ray.actor.exit_actor()

    def task(self, node: str) -> WorkerTask:
        return self._driver.task(node)

    def relay(self, node: str, records: list[Record]) -> list[Order]:
        return self._driver.relay(node, records)

    def ping(self) -> str:
        return self._driver.ping()

    def nudge(self) -> None:
        self._driver.nudge()


def _display_name(job_id: str, attempt: int, parts: DriverParts) -> str:
    try:
        tenant = parts.store.assignment(job_id, attempt).tenant
    except HeliostatError:  # only a name to show; the driver meets the same trouble and deals with it
        tenant = "?"
    return f"JobDriver(tenant={tenant}, job={job_id}, attempt={attempt})"


class RayDriverLauncher:
    """`cluster.ports.DriverLauncher`. `wiring` is a module-level function: Ray ships its name."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring

    def start(self, job_id: str, attempt: int) -> None:
        try:
            self._start(job_id, attempt)
        except RayError as error:
            raise _ray_silent(error) from error

    def _start(self, job_id: str, attempt: int) -> None:
        actor = (
            ray.remote(DriverActor)
            .options(
                name=driver_name(job_id, attempt),
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_restarts=0,
                max_concurrency=CONCURRENCY,
                num_cpus=0,
                resources=CONTROL_RESOURCE,
                runtime_env={"env_vars": TRAIN_VARIABLES},
            )
            .remote(job_id, attempt, self._wiring)
        )
        actor.run.remote()

    def alive(self, job_id: str, attempt: int) -> bool | None:
        try:
            actor = ray.get_actor(driver_name(job_id, attempt), namespace=NAMESPACE)
            ray.get(actor.ping.remote(), timeout=_PING_S)
        except (ValueError, RayActorError):
            return False
        except RaySystemError as error:
            raise _ray_silent(error) from error
        except RayError:  # late, or it cannot be set up on its node: the lease runs out
            return None
        return True

    def nudge(self, job_id: str, attempt: int) -> None:
        try:
            ray.get_actor(driver_name(job_id, attempt), namespace=NAMESPACE).nudge.remote()
        except (ValueError, RayError) as error:
            log.debug("the driver of job %s attempt %d was not nudged: %s", job_id, attempt, error)

    def end(self, job_id: str, attempt: int) -> None:
        """Its workers are its own: Ray ends them with it."""
        try:
            kill_actor(driver_name(job_id, attempt))
        except RayError as error:
            raise _ray_silent(error) from error


def _ray_silent(error: Exception) -> Unavailable:
    return Unavailable(f"Ray does not answer: {error}", code="ray_unavailable")
