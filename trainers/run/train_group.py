"""Ray Train's part in an attempt: a worker on each node of the gang, where the lease says. Imported when it is needed only."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import ray
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext
from ray.train.v2.api.config import RunConfig as RunConfigV2
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.api.result import Result

from trainers.run.actors import first_line
from trainers.run.gang import NODE_LABEL
from trainers.run.parts import GangRequest, WorkersLost


class TrainGroup:
    """One run of Train. `work` runs on each worker, with `config`."""

    def __init__(self, request: GangRequest, work: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
        self._request = request
        self._work = work
        self._config = config
        self._workers = _Workers()

    def run(self) -> None:
        """Blocks until all workers have returned. Raises `WorkersLost`."""
        try:
            self._fit()
        except (TrainingFailedError, RayError, OSError, RuntimeError) as error:
            raise WorkersLost(f"the worker group was lost: {first_line(error)}") from error

    def _fit(self) -> None:
        scaling, run = _scaling(self._request), _run_config(self._request)
        _Trainer(
            self._workers, self._work, train_loop_config=self._config, scaling_config=scaling, run_config=run
        ).fit()

    def end(self) -> None:
        """Workers that are still on their way are ended as soon as they are there, or with this process, which owns them."""
        self._workers.end()


class _Workers(WorkerGroupCallback):
    """The workers of a run, from when they are there."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actors: list[ActorHandle[Any]] = []
        self._ended = False

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        self._refuse_when_ended()

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """Train's barrier is ended: an idle process for each job, for `ray.train.report`, which nobody calls."""
        state = worker_group.get_worker_group_state()
        ray.kill(state.sync_actor)
        with self._lock:
            self._actors = [worker.actor for worker in state.workers]
        if self._ended:
            self.end()
            state.placement_group_handle.shutdown()  # Train would not, of a group that nearly started
            self._refuse_when_ended()

    def _refuse_when_ended(self) -> None:
        """Train does not try again after this error."""
        if self._ended:
            raise RuntimeError("the attempt was ended before its workers started")

    def end(self) -> None:
        with self._lock:
            self._ended = True
            actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor)


class _Trainer(DataParallelTrainer):
    """Two private hooks of Train 2.60, for what its public interface lacks (see README.md): the controller runs in this process
    instead of one of its own, and without the cleaner of placement groups and the manager of datasets, two more."""

    def __init__(self, workers: _Workers, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        self._workers = workers

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        unwanted = (PlacementGroupCleanerCallback, DatasetsCallback)
        callbacks = [one for one in super()._create_default_callbacks() if not isinstance(one, unwanted)]
        return [*callbacks, self._workers]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        controller = TrainController(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()


def _scaling(request: GangRequest) -> ScalingConfig:
    return ScalingConfig(
        num_workers=len(request.nodes),
        use_gpu=False,
        resources_per_worker={"CPU": 0.01},
        label_selector=[{NODE_LABEL: node} for node in request.nodes],
    )


def _run_config(request: GangRequest) -> RunConfigV2:
    """Train tries nothing again: what follows a failure is the scheduler's decision. Nobody uses the storage that it asks for: in
    memory, since a driver that ends, or is killed, would leave a folder behind."""
    return RunConfig(
        name=request.name,
        storage_path="train",
        storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
        failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        worker_runtime_env={
            "tenant_env": request.fingerprint,
            "env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        },
    )
