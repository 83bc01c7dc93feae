"""Ray's actors of an attempt by name, and the agents' as `trainers.run.parts.Agents`."""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from cluster.errors import HeliostatError, Unavailable
from cluster.ports import NodeReport
from trainers.run.parts import WorkerTask

log = logging.getLogger(__name__)

NAMESPACE = "heliostat"
_CALL_S = 60.0
_PREPARE_S = 3600.0
"""Making an environment or fetching a model can take long; the scheduler's stage limit ends what never ends."""


def driver_name(job_id: str, attempt: int) -> str:
    return f"job-{job_id}-a{attempt}"


def kill_actor(name: str) -> None:
    """Does nothing when there is none of that name."""
    try:
        ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    except ValueError:
        log.debug("no actor %s to end", name)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


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
        message = f"the agent of node {self._node} could not do its part: {first_line(error)}"
        return Unavailable(message, code="node_unavailable")
