"""The one place where `cluster` talks to Ray: makes the scheduler and the agents detached actors, and calls them with
time limits. Ray's errors end here: callers see `Unavailable`."""

from __future__ import annotations

import logging
import os
import socket
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from cluster.agent import NodeAgent
from cluster.errors import Fenced, HeliostatError, Unavailable
from cluster.metrics import RayWatch, environment_counters
from cluster.ports import AgentParts, Attempt, CheckedEnvironment, NodeReport, SchedulerParts, StagedModel
from cluster.scheduler import Scheduler

log = logging.getLogger(__name__)

NAMESPACE = "heliostat"
SCHEDULER = "scheduler"
NODE_LABEL = "heliostat-node"
"""Of the nodes that are ours, with a name that survives a restart of the raylet (Ray's own node id does not)."""

CONTROL_RESOURCE = "heliostat_control"
"""Of the nodes that control actors may live on."""

QUESTIONS = 32
"""That the scheduler has open at a time, to agents and drivers."""

REPORT_TIMEOUT_S = 5.0
END_TIMEOUT_S = 15.0
CHECK_TIMEOUT_S = 600.0
STAGE_TIMEOUT_S = 3600.0

SchedulerWiring = Callable[[], SchedulerParts]
AgentWiring = Callable[[], AgentParts]


def connect(address: str) -> None:
    """Joins the Ray cluster at `address` (host:port); the token, if it has one, comes from the environment."""
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, ignore_reinit_error=True)


def agent_name(node: str) -> str:
    return f"agent-{node}"


def our_nodes() -> dict[str, float]:
    """Living nodes by name, with the number of GPUs that Ray sees there. Raises `Unavailable`."""
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and NODE_LABEL in node["Labels"]]
    except RayError as error:
        raise _unavailable("Ray does not list its nodes", error) from error
    return {node["Labels"][NODE_LABEL]: node["Resources"].get("GPU", 0.0) for node in nodes}


def ensure_agents(wiring: AgentWiring) -> dict[str, ActorHandle[Any]]:
    """An agent on every living node of ours, made where there is none; by node. Does not wait for them to start.
    Raises `Unavailable`."""
    return {node: _ensure_agent(node, gpus, wiring) for node, gpus in our_nodes().items()}


def _ensure_agent(node: str, gpus: float, wiring: AgentWiring) -> ActorHandle[Any]:
    actor = _agents.options(
        name=agent_name(node),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        label_selector={NODE_LABEL: node},
        num_cpus=0,
        num_gpus=gpus,  # all of them: leases, not Ray, say who uses which
        max_restarts=-1,
        max_task_retries=3,  # all methods can be repeated
    )
    try:
        return actor.remote(node, wiring)
    except RayError as error:
        raise _unavailable(f"Ray does not make the agent of node {node}", error) from error


def node_agent(node: str) -> ActorHandle[Any]:
    """Raises `Unavailable`."""
    return _actor(agent_name(node))


def ensure_scheduler(wiring: SchedulerWiring, timeout_s: float = 60.0) -> None:
    """The scheduler's actor, made if it is not there, and its answer awaited.
    Raises `Unavailable`, `Fenced` when a scheduler of another cluster rules this database."""
    actor = _schedulers.options(
        name=SCHEDULER,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        resources={CONTROL_RESOURCE: 0.001},
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,  # callers ask for now
    )
    try:
        scheduler = actor.remote(wiring)
    except RayError as error:
        raise _unavailable("Ray does not make the scheduler", error) from error
    ask(scheduler.ping.remote(), timeout_s)


def scheduler_state(timeout_s: float = 10.0) -> dict[str, Any]:
    """Raises `Unavailable`."""
    state: dict[str, Any] = ask(_actor(SCHEDULER).state.remote(), timeout_s)
    return state


def ask(answer: Any, timeout_s: float) -> Any:
    """The result of a call to an actor. Raises what the actor raised of the house's errors, else `Unavailable`."""
    try:
        return ray.get(answer, timeout=timeout_s)
    except RayError as error:
        # Not Ray's own form of it, whose `code` is that of the class and whose words are a stack.
        if isinstance(error, RayTaskError) and isinstance(error.cause, HeliostatError):
            raise error.cause from None
        raise _unavailable("an actor did not answer", error) from error


def _actor(name: str) -> ActorHandle[Any]:
    try:
        return ray.get_actor(name, NAMESPACE)
    except (ValueError, RayError) as error:
        raise _unavailable(f"actor {name} is not there", error) from error


def _unavailable(what: str, error: Exception) -> Unavailable:
    return Unavailable(f"{what}: {type(error).__name__}", code="ray_unavailable", hint="Look at `heliostat status`.")


class RayNodes:
    """`cluster.ports.Nodes` over the agents that there are."""

    def reports(self) -> Sequence[NodeReport]:
        calls = {agent.report.remote(): node for node, agent in _agents_there().items()}
        if not calls:
            return []
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=REPORT_TIMEOUT_S)
        if late:
            log.warning("no report in %.0f s from nodes %s", REPORT_TIMEOUT_S, sorted(calls[call] for call in late))
        return [report for call in ready if (report := _report(call, calls[call])) is not None]

    def end_attempt(self, node: str, job_id: str, attempt: int) -> bool | None:
        if node not in our_nodes():  # its agent waits for the node to come back, and so would the call
            return None
        try:
            return bool(ray.get(node_agent(node).end_attempt.remote(job_id, attempt), timeout=END_TIMEOUT_S))
        except (Unavailable, RayError) as error:
            log.warning("node %s cannot say whether job %s attempt %d lives: %s", node, job_id, attempt, error)
            return None

    def expect(self, node: str, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        unknown: Sequence[Attempt] = ask(node_agent(node).expect.remote(attempts), REPORT_TIMEOUT_S)
        return unknown

    def stage_ahead(self, node: str, model: StagedModel) -> None:
        try:
            ray.get(node_agent(node).stage_ahead.remote(model), timeout=STAGE_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, HeliostatError):
                raise error.cause from None
            raise _unavailable(f"node {node} did not copy a model", error.cause) from error
        except RayError as error:
            raise _unavailable(f"node {node} did not copy a model", error) from error

    def prepare_ahead(self, node: str, coming: Any) -> None:
        ask(node_agent(node).prepare_ahead.remote(coming), REPORT_TIMEOUT_S)


def check_environment(fingerprint: str, repair: bool) -> dict[str, CheckedEnvironment | HeliostatError]:
    """Of every node that has it: what its agent found, or why it could not. Raises `Unavailable`."""
    calls = {node: agent.check_environment.remote(fingerprint, repair) for node, agent in _agents_there().items()}
    found: dict[str, CheckedEnvironment | HeliostatError] = {}
    for node, call in calls.items():
        try:
            checked = ask(call, CHECK_TIMEOUT_S)
        except HeliostatError as error:
            found[node] = error
        else:
            found |= {} if checked is None else {node: checked}
    return found


def _agents_there() -> dict[str, ActorHandle[Any]]:
    found = {}
    for node in our_nodes():
        try:
            found[node] = node_agent(node)
        except Unavailable as error:  # it just joined, or its agent is being made
            log.info("node %s has no agent: %s", node, error)
    return found


def _report(call: Any, node: str) -> NodeReport | None:
    try:
        report: NodeReport = ray.get(call)
        return report
    except RayError as error:
        log.warning("no report from node %s: %s", node, error)
        return None


class AgentActor(NodeAgent):
    """An environment may take minutes, and eight may be made at a time; reports, starts and ends go by threads of their own."""

    def __init__(self, name: str, wiring: AgentWiring) -> None:
        logging.basicConfig(level=logging.INFO)
        super().__init__(name, wiring, environment_counters(name))

    @ray.method(concurrency_group="control")
    def report(self) -> NodeReport:
        return super().report()

    @ray.method(concurrency_group="control")
    def expect(self, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        return super().expect(attempts)

    @ray.method(concurrency_group="control")
    def prepare_ahead(self, coming: Any) -> None:
        super().prepare_ahead(coming)

    @ray.method(concurrency_group="control")
    def meeting_point(self) -> str:
        """Where a gang over several nodes may meet: nobody listens there at this moment."""
        address = ray.util.get_node_ip_address()
        return f"{address}:{_free_port(address)}"

    @ray.method(concurrency_group="starts")
    def start_child(self, task: Any) -> str | None:
        return super().start_child(task)

    @ray.method(concurrency_group="control")
    def end_attempt(self, job_id: str, attempt: int) -> bool:
        return super().end_attempt(job_id, attempt)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class SchedulerActor(Scheduler):
    def __init__(self, wiring: SchedulerWiring) -> None:
        logging.basicConfig(level=logging.INFO)
        pool = ThreadPoolExecutor(QUESTIONS, thread_name_prefix="ask")
        super().__init__(wiring, RayNodes(), pool=pool, watch=RayWatch())
        self._fenced: Fenced | None = None
        # Started here, because after a crash Ray calls nothing but the constructor.
        threading.Thread(target=self._work, name="scheduler", daemon=True).start()

    def ping(self) -> int:
        if self._fenced is not None:
            raise self._fenced
        return super().ping()

    def _work(self) -> None:
        """A loop that breaks takes the process with it, so that Ray begins a new one. A fenced one stays, idle: Ray
        would restart it, it would take the epoch back, and two schedulers would fence each other for ever."""
        try:
            self.run()
        except Fenced as error:
            self._fenced = error
            log.warning("another scheduler has taken over: %s", error)
        finally:
            if self._fenced is None:
                traceback.print_exc()
                os._exit(1)


_agents: Any = ray.remote(concurrency_groups={"control": 4, "starts": 2}, max_concurrency=8)(AgentActor)
_schedulers: Any = ray.remote(max_concurrency=4)(SchedulerActor)
