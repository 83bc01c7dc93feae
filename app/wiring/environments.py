"""Environments, of the API and of a node."""

from __future__ import annotations

from typing import Any

from app.environment_places import conda_places, disk_budget, from_storage, pip_index
from app.settings import Settings
from cluster.errors import EnvironmentError_, Unavailable
from cluster.ports import CheckedEnvironment, PreparedEnvironment
from cluster.storage.objects import ObjectStore
from runtime_envs.environments import Environments
from runtime_envs.environments import solve_environment as solve
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.fingerprint import identity
from runtime_envs.lock import Solved


def solve_environment(settings: Settings, text: str) -> Solved:
    """environment.yml → lock. Raises `EnvironmentError_`, `Unavailable`."""
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


def of_the_house(problem: EnvironmentProblem) -> EnvironmentError_ | Unavailable:
    """`Unavailable` where the file is not to blame: its job is tried again."""
    kind = EnvironmentError_ if problem.fixable_by == "user" else Unavailable
    return kind(
        problem.message,
        code=problem.code,
        param="environment",
        hint=problem.hint,
        fixable_by=problem.fixable_by,
    )
