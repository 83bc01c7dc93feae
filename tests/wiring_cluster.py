"""Wirings of the scheduler and the agent for tests with a real Ray: Ray ships their names, a folder in the environment
holds what they share. Drivers are Ray actors that do nothing but live."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from fakes_cluster import FileStore, NoEnvironments

from cluster.ports import AgentParts, NodeSettings, SchedulerParts, SchedulerSettings

FOLDER_VARIABLE = "HELIOSTAT_TEST_FOLDER"


def folder() -> Path:
    return Path(os.environ[FOLDER_VARIABLE])


def scheduler_parts() -> SchedulerParts:
    times = SchedulerSettings(lease_ttl_s=600, margin_s=1, poll_s=0.2)
    return SchedulerParts(FileStore(folder() / "rows.pickle"), ActorDrivers(), times)


def agent_parts() -> AgentParts:
    return AgentParts(
        NoEnvironments(folder()), NodeSettings(folder() / "node", str(folder() / "objects"), "cpu", 2, 1.0)
    )


class Driver:
    def ping(self) -> bool:
        return True


class ActorDrivers:
    """`cluster.ports.DriverLauncher`."""

    def start(self, job_id: str, attempt: int) -> None:
        actor = ray.remote(Driver).options(
            name=f"driver-{job_id}-{attempt}", lifetime="detached", get_if_exists=True, num_cpus=0
        )
        actor.remote()

    def alive(self, job_id: str, attempt: int) -> bool:
        try:
            ray.get_actor(f"driver-{job_id}-{attempt}")
        except ValueError:
            return False
        return True

    def nudge(self, job_id: str, attempt: int) -> None:
        """These drivers look at nothing."""

    def end(self, job_id: str, attempt: int) -> None:
        try:
            ray.kill(ray.get_actor(f"driver-{job_id}-{attempt}"))
        except ValueError:
            return
