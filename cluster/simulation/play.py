"""One simulation from a trace to figures: builds the cluster and the policy by name. The command line and the benchmark use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cluster.core.job import Node, TenantShare
from cluster.errors import InvalidRequest, ResourceError
from cluster.simulation.engine import Chooser, Hooks, NodeChange, Replay, Run, Scene, all_at_once
from cluster.simulation.figures import Figures
from cluster.simulation.heliostat import Heliostat, policy_for
from cluster.simulation.log import RunLog
from cluster.simulation.opponents import OPPONENTS, POLICIES, Repacker
from cluster.simulation.trace import TraceJob

KIND = "V100-16GB"
"""Of the nodes of a cluster that is described by numbers alone; the trace may ask for nothing else."""


@dataclass(frozen=True)
class Setting:
    """`changes`: when each node comes and goes; None: `nodes` like ones from the start."""

    nodes: int = 64
    slots_per_node: int = 8
    switch_cost_s: float = 30.0
    policy: str = "heliostat"
    log: Path | None = None
    until_s: float | None = None
    changes: Sequence[NodeChange] | None = None
    tenants: tuple[TenantShare, ...] = field(default=())

    def node_changes(self) -> Sequence[NodeChange]:
        if self.changes is not None:
            return self.changes
        return all_at_once(Node(str(number), KIND, self.slots_per_node, 16.0) for number in range(self.nodes))


def simulate(
    jobs: Sequence[TraceJob], setting: Setting, on_progress: Callable[[int, float], None] = lambda done, now: None
) -> dict[str, float]:
    """The figures of one policy on one trace. Raises `ResourceError` for a job that no cluster of this size could run."""
    _check_fit(jobs, setting)
    figures = Figures(jobs, setting.slots_per_node, setting.nodes * setting.slots_per_node, setting.switch_cost_s)
    scene = Scene(jobs, setting.node_changes(), setting.switch_cost_s, setting.until_s)
    with ExitStack() as stack:
        log = None if setting.log is None else stack.enter_context(RunLog(setting.log))

        def on_run(run: Run) -> None:
            figures.add(run)
            if log is not None:
                log.write(run)

        Replay(scene, chooser_of(setting), Hooks(on_run, on_progress)).play()
    return figures.as_dict()


def chooser_of(setting: Setting) -> Chooser:
    if setting.policy == "heliostat":
        return Heliostat(policy_for(setting.switch_cost_s), setting.slots_per_node, setting.tenants)
    if setting.policy not in OPPONENTS:
        raise InvalidRequest(
            f"there is no policy {setting.policy}", param="--policy", hint=f"one of {', '.join(POLICIES)}"
        )
    return Repacker(OPPONENTS[setting.policy], setting.slots_per_node, setting.switch_cost_s)


def _check_fit(jobs: Sequence[TraceJob], setting: Setting) -> None:
    if setting.changes is not None:
        return
    most = setting.nodes * setting.slots_per_node
    for job in jobs:
        if job.slots > most:
            raise ResourceError(
                f"job {job.number} needs {job.slots} GPUs; {setting.nodes} nodes have {most}",
                param="--nodes",
                hint="simulate more nodes, or leave the job out",
            )
        if job.kinds:
            raise ResourceError(
                f"job {job.number} asks for {job.kinds[0]}; nodes of a simulation from the command line have no kind",
                param="TRACE",
                hint="leave the column gpu_type out",
            )
