"""`trainers.run.parts.Gang` with Ray Train, and what Train's workers run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from trainers.run.actors import NAMESPACE, driver_name, first_line
from trainers.run.parts import DriverGone, GangRequest, Order, Record, WorkersLost, WorkerTask
from trainers.run.worker import work

if TYPE_CHECKING:
    from trainers.run.train_group import TrainGroup

NODE_LABEL = "heliostat-node"
_CALL_S = 60.0

T = TypeVar("T")


def train_worker(config: dict[str, Any]) -> None:
    """What Train runs. `config` names the driver, no more: it lies in the object store."""
    work(RayDriverHandle(config["driver"], ray.get_runtime_context().get_node_labels()[NODE_LABEL]))


class RayGang:
    def __init__(self, job_id: str, attempt: int) -> None:
        self._driver = driver_name(job_id, attempt)
        self._lock = threading.Lock()
        self._ended = False
        self._group: TrainGroup | None = None

    def run(self, request: GangRequest) -> None:
        from trainers.run.train_group import TrainGroup  # Train takes a second to import; the child has started by now

        config = {"job_id": request.job_id, "attempt": request.attempt, "driver": self._driver}
        with self._lock:
            if self._ended:
                raise WorkersLost("the attempt was ended before its workers started")
            self._group = TrainGroup(request, train_worker, config)
        self._group.run()

    def end(self) -> None:
        with self._lock:
            self._ended = True
        if self._group is not None:
            self._group.end()


class RayDriverHandle:
    """`trainers.run.parts.DriverHandle` from within a Train worker."""

    def __init__(self, name: str, node: str) -> None:
        self._name = name
        self._node = node
        self._actor: ActorHandle[Any] | None = None

    def task(self) -> WorkerTask:
        return self._call(lambda driver: driver.task.remote(self._node))

    def relay(self, records: list[Record]) -> list[Order]:
        return self._call(lambda driver: driver.relay.remote(self._node, records))

    def _call(self, call: Callable[[Any], Any]) -> Any:
        try:
            if self._actor is None:
                self._actor = ray.get_actor(self._name, namespace=NAMESPACE)
            return ray.get(call(self._actor), timeout=_CALL_S)
        except (ValueError, RayError) as error:
            raise DriverGone(f"{self._name}: {first_line(error)}") from error
