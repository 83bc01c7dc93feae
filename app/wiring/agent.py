"""Of the agent of a node."""

from __future__ import annotations

from app.settings import load_settings
from app.wiring.environments import NodeEnvironments, node_environments
from cluster.ports import AgentParts, NodeSettings
from runtime_envs import budget
from runtime_envs.sandbox import cgroup
from trainers.run.nursery import Nursery


def agent_parts() -> AgentParts:
    cgroup.sweep()
    settings = load_settings()
    node = settings.node
    budget.sweep(settings.node_root)
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
