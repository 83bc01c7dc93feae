"""The wiring of the Ray test: processes of a Ray cluster find the job's rows in an actor, the node's agent in another."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from fakes_driver import FolderAgent, MemoryStore

from cluster.storage.objects import ObjectStore
from trainers.run.nursery import Nursery
from trainers.run.parts import DriverParts, DriverSettings

ROOT_VARIABLE = "HELIOSTAT_TEST_ROOT"
NAMESPACE = "heliostat"
METHODS = (
    *("assignment", "heartbeat", "allowance", "move", "park"),
    *("event", "record_steps", "commit_checkpoint", "finish"),
)


def objects_url() -> str:
    return str(Path(os.environ[ROOT_VARIABLE]) / "objects")


class RemoteStore:
    """`DriverStore` over the actor `rows`."""

    def __getattr__(self, name: str) -> Any:
        assert name in METHODS
        rows = ray.get_actor("rows", namespace=NAMESPACE)
        return lambda *args, **kwargs: ray.get(getattr(rows, name).remote(*args, **kwargs), timeout=30)


class Rows(MemoryStore):
    def snapshot(self) -> dict[str, Any]:
        return {**vars(self), "on_checkpoint": None}

    def change(self, **changes: Any) -> None:
        vars(self).update(changes)


class EarlyAgent(FolderAgent):
    def __init__(self, root: Path, storage: ObjectStore) -> None:
        super().__init__(root, storage, Nursery())


def driver_parts() -> DriverParts:
    settings = DriverSettings(objects_url(), checkpoint_every_s=0.0, exact_match_rows=2)
    return DriverParts(RemoteStore(), settings)


def start_agent(node: str) -> Any:
    root = Path(os.environ[ROOT_VARIABLE]) / node
    agent = ray.remote(EarlyAgent).options(
        name=f"agent-{node}",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        max_concurrency=4,
        label_selector={"heliostat-node": node},
    )
    return agent.remote(root, ObjectStore(objects_url()))
