"""Ray's part in an attempt, in one place: a Train run whose workers stand where the lease says, and the agents' actors."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.config import RunConfig as RunConfigV2
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result

from cluster.errors import HeliostatError, Unavailable
from cluster.ports import NodeReport
from trainers.run.parts import DriverGone, GangRequest, Order, Record, WorkersLost, WorkerTask
from trainers.run.worker import work

log = logging.getLogger(__name__)

NAMESPACE = "heliostat"
NODE_LABEL = "heliostat-node"
_CALL_S = 60.0
_PREPARE_S = 3600.0
"""Making an environment or fetching a model can take long; the scheduler's stage limit ends what never ends."""

T = TypeVar("T")


def driver_name(job_id: str, attempt: int) -> str:
    return f"job-{job_id}-a{attempt}"


def controller_name(job_id: str, attempt: int) -> str:
    return f"train-{job_id}-a{attempt}"


def kill_actor(name: str) -> None:
    """Does nothing when there is none of that name."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError:
        log.debug("no actor %s to end", name)


class _Trainer(DataParallelTrainer):
    """Two private hooks of Train 2.60, for what its public interface lacks (see README.md): the controller is a detached
    actor with a name, so that it can be found and ended when its driver is dead, and Ray removes its placement group
    with it; the cleaner and the dataset manager, two more processes a job, are then not needed."""

    def __init__(self, controller: str, request: GangRequest, config: dict[str, Any]) -> None:
        super().__init__(
            train_worker,
            train_loop_config=config,
            scaling_config=_scaling(request),
            run_config=_run_config(request),
        )
        self._controller = controller

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unwanted)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        controller = (
            ray.remote(TrainController)
            .options(
                name=self._controller,
                namespace=NAMESPACE,
                lifetime="detached",
                num_cpus=0,
                label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},
                runtime_env={"env_vars": get_env_vars_to_propagate()},
            )
            .remote(**arguments)
        )
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


def _scaling(request: GangRequest) -> ScalingConfig:
    return ScalingConfig(
        num_workers=len(request.nodes),
        use_gpu=False,
        resources_per_worker={"CPU": 0.01},
        label_selector=[{NODE_LABEL: node} for node in request.nodes],
    )


def _run_config(request: GangRequest) -> RunConfigV2:
    return RunConfig(
        name=request.name,
        storage_path=f"{request.scratch}/train",
        failure_config=FailureConfig(max_failures=0),
        worker_runtime_env={
            "tenant_env": request.fingerprint,
            "env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        },
    )


def train_worker(config: dict[str, Any]) -> None:
    """What Train runs. `config` names the driver, no more: it lies in the object store."""
    work(RayDriverHandle(config["driver"], ray.get_runtime_context().get_node_labels()[NODE_LABEL]))


class RayGang:
    """`trainers.run.parts.Gang` with Ray Train."""

    def __init__(self, job_id: str, attempt: int) -> None:
        self._driver = driver_name(job_id, attempt)
        self._controller = controller_name(job_id, attempt)
        self._ended = threading.Event()

    def run(self, request: GangRequest) -> None:
        if self._ended.is_set():
            raise WorkersLost("the attempt was ended before its workers started")
        config = {"job_id": request.job_id, "attempt": request.attempt, "driver": self._driver}
        try:
            _Trainer(self._controller, request, config).fit()
        except (TrainingFailedError, RayError) as error:
            raise WorkersLost(f"the worker group was lost: {_first_line(error)}") from error

    def end(self) -> None:
        self._ended.set()
        kill_actor(self._controller)


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
            raise DriverGone(f"{self._name}: {_first_line(error)}") from error


class RayAgents:
    """`trainers.run.parts.Agents`: the actors `agent-<node>`."""

    def of(self, node: str) -> RayAgent:
        try:
            return RayAgent(node, ray.get_actor(f"agent-{node}", namespace=NAMESPACE))
        except ValueError:
            raise Unavailable(f"node {node} has no agent", code="node_unavailable") from None


class RayAgent:
    def __init__(self, node: str, actor: Any) -> None:
        self._node = node
        self._actor = actor

    def report(self) -> NodeReport:
        return self._get(self._actor.report.remote(), _CALL_S)

    def prepare_environment(self, lock: dict[str, Any]) -> dict[str, Any]:
        return self._get(self._actor.prepare_environment.remote(lock), _PREPARE_S)

    def stage_model(self, prefix: str, sha256: str, files: dict[str, str] | None = None) -> str:
        return self._get(self._actor.stage_model.remote(prefix, sha256, files), _PREPARE_S)

    def stage_attempt(
        self, job_id: str, attempt: int, files: dict[str, tuple[str, str]], *, ahead: bool = False
    ) -> str:
        return self._get(self._actor.stage_attempt.remote(job_id, attempt, files, ahead=ahead), _PREPARE_S)

    def start_child(self, task: WorkerTask) -> str | None:
        """Waited for: one that starts after all, and a worker's own, would be two."""
        return self._get(self._actor.start_child.remote(task), _PREPARE_S)

    def meeting_point(self) -> str:
        return self._get(self._actor.meeting_point.remote(), _CALL_S)

    def clear_ahead(self, job_id: str, attempt: int) -> None:
        self._get(self._actor.clear_ahead.remote(job_id, attempt), _CALL_S)

    def clear_attempt(self, job_id: str, attempt: int) -> None:
        self._get(self._actor.clear_attempt.remote(job_id, attempt), _CALL_S)

    def _get(self, reference: Any, timeout_s: float) -> Any:
        """The agent's own errors as they are; everything else means that the node cannot do it now."""
        try:
            return ray.get(reference, timeout=timeout_s)
        except RayTaskError as error:
            if isinstance(error.cause, HeliostatError):
                raise error.cause from None
            raise self._unavailable(error.cause) from error
        except (RayActorError, GetTimeoutError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> Unavailable:
        message = f"the agent of node {self._node} could not do its part: {_first_line(error)}"
        return Unavailable(message, code="node_unavailable")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
