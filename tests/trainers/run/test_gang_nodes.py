"""A gang over two nodes: a driver with two workers and two real children that meet over TCP, each on a data folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from builders_child import tree_of
from builders_llama import capital_rows, make_tiny_llama
from fakes_driver import JOB, FolderAgent, MemoryStore, ThreadGang, make_assignment
from waiting import PATIENCE_S, until

from cluster.core.events import How
from cluster.core.job import JobState, Placement, Wish
from cluster.errors import EnvironmentError_, JobFailure
from cluster.processes import running_attempts
from cluster.storage.objects import ObjectStore
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.spec import Isolation
from trainers.child.model import STATE_FILE
from trainers.config import Hyperparams
from trainers.run.child_process import Child, meeting_over, spawn
from trainers.run.conversation import MAX_WAITING_ORDERS
from trainers.run.driver import JobDriver
from trainers.run.parts import DriverParts, DriverSettings, Outcome, WorkerTask
from trainers.run.preparing import Part, parts_of
from trainers.run.worker import Worker

pytestmark = pytest.mark.integration

UID = 31_779
TWO_NODES = {"n1": (0,), "n2": (0,)}
HYPER: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "lr": 1e-2, "lora_r": 4, "lora_dropout": 0.1, "seed": 3}


class GangAgents:
    """`Agents`; each node has a folder of its own."""

    def __init__(self, root: Path, storage: ObjectStore) -> None:
        self.nodes = {name: FolderAgent(root / name, storage) for name in ("n1", "n2")}

    def of(self, node: str) -> FolderAgent:
        return self.nodes[node]


class GangOfNodes:
    """One job of a tiny model, placed as `nodes` says. `children`: pids of the launchers, by node."""

    def __init__(
        self,
        root: Path,
        base: Path,
        nodes: dict[str, tuple[int, ...]] = TWO_NODES,
        isolation: Isolation = Isolation.OFF,
        **hyper: Any,
    ) -> None:
        self.storage = ObjectStore(str(root / "objects"))
        model = {file.name: file.read_bytes() for file in base.iterdir()}
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in capital_rows(24))
        given = make_assignment(
            self.storage,
            model,
            rows=rows,
            hyperparams=Hyperparams(**HYPER | hyper),
            placement=Placement(nodes),
            uid=UID,
        )
        self.store = MemoryStore(given)
        self.agents = GangAgents(root, self.storage)
        self.gang = ThreadGang(self.storage, None)
        self.gang._spawn = self._spawn
        self.children: dict[str, int] = {}
        times = {"lease_ttl_s": 0.3, "relay_s": 0.05, "checkpoint_every_s": 0.0}
        settings = DriverSettings(str(root / "objects"), isolation=isolation, **times)
        self.driver = self.gang.driver = JobDriver(JOB, 1, DriverParts(self.store, settings), self.agents, self.gang)
        self._thread = threading.Thread(target=self.driver.run)

    def _spawn(self, task: WorkerTask) -> Child:
        child = spawn(task)
        self.children["n1" if "/n1/" in task.scratch else "n2"] = child.process.pid
        return child

    def start(self) -> None:
        self._thread.start()

    def end(self) -> GangOfNodes:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        until(lambda: (JOB, 1) not in running_attempts())
        return self

    def run(self) -> GangOfNodes:
        self.start()
        return self.end()

    @property
    def losses(self) -> list[float]:
        return [row.loss for _, row in sorted(self.store.steps.items())]

    def evaluations(self) -> list[tuple[str, float]]:
        return [(data["when"], data["loss"]) for type, _, data in self.store.events if type == "evaluated"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def on_one_node(base: Path, tmp_path_factory: pytest.TempPathFactory) -> GangOfNodes:
    return GangOfNodes(tmp_path_factory.mktemp("one"), base, {"n1": (0, 1)}).run()


def test_two_nodes_compute_what_one_with_as_many_slots_does(
    on_one_node: GangOfNodes, base: Path, tmp_path: Path
) -> None:
    job = GangOfNodes(tmp_path, base).run()
    assert job.store.state is JobState.SUCCEEDED, job.store.error
    assert job.losses == on_one_node.losses and len(job.losses) == HYPER["max_steps"]
    assert job.store.result is not None and on_one_node.store.result is not None
    weights = "adapter_model.safetensors"
    assert job.store.result["files"][weights] == on_one_node.store.result["files"][weights]
    assert {node for node, agent in job.agents.nodes.items() if agent.cleared} == {"n1", "n2"}


def test_each_node_leaves_the_log_of_its_ranks(base: Path, tmp_path: Path) -> None:
    job = GangOfNodes(tmp_path, base, max_steps=1).run()
    logs = {key.split("/logs/a1/")[1].split("/")[0] for key in job.storage.keys(f"tenants/t1/jobs/{JOB}/logs/")}
    assert logs == {"r0", "r1"} and not job.store.error


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_shares_out_over_nodes(base: Path, tmp_path: Path, on_one_node: GangOfNodes, stage: int) -> None:
    job = GangOfNodes(tmp_path, base, zero_stage=stage, lora_dropout=0.0).run()
    alone = GangOfNodes(tmp_path / "alone", base, {"n1": (0, 1)}, zero_stage=stage, lora_dropout=0.0).run()
    assert job.store.state is JobState.SUCCEEDED, job.store.error
    assert job.losses == alone.losses


@pytest.mark.parametrize("training_type", ["lora", "full"])
def test_the_best_weights_reach_the_node_without_the_checkpoint(base: Path, tmp_path: Path, training_type: str) -> None:
    """With a learning rate that spoils what was learned: the best is not the last."""
    hyper = {
        "validation_split": 0.3,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "lr": 0.3,
        "max_steps": 5,
        "lr_scheduler": "constant",
    }
    job = GangOfNodes(tmp_path, base, **hyper)
    object.__setattr__(job.store.given, "training_type", training_type)
    job.run()
    assert job.store.state is JobState.SUCCEEDED, job.store.error
    during = [loss for when, loss in job.evaluations() if when == "during"]
    after = dict(job.evaluations())["after"]
    assert min(during) < during[-1], "the last weights are not the best ones"
    assert after == pytest.approx(min(during), rel=1e-6), "both nodes evaluate the best weights"


def test_ranks_of_both_nodes_park_and_go_on_with_the_same_numbers(base: Path, tmp_path: Path) -> None:
    """Of more steps than pass while the order is on its way."""
    alone = GangOfNodes(tmp_path / "alone", base, {"n1": (0, 1)}, max_steps=24).run()
    job = GangOfNodes(tmp_path, base, max_steps=24)
    job.start()
    until(lambda: bool(job.store.steps))
    job.store.order = How.PARK
    job.driver.nudge()
    until(lambda: job.store.state is JobState.PARKED)
    job.store.state = JobState.RUNNING
    job.driver.nudge()
    job.end()
    assert job.store.state is JobState.SUCCEEDED, job.store.error
    assert job.losses == alone.losses and len(job.losses) == 24


def test_a_rank_that_is_killed_on_another_node_ends_the_attempt_with_its_own_word(base: Path, tmp_path: Path) -> None:
    job = GangOfNodes(tmp_path, base, max_steps=10_000)
    job.start()
    until(lambda: len(job.store.steps) > 2)
    os.kill(max(tree_of(job.children["n2"])), signal.SIGKILL)
    job.end()
    assert job.store.state is JobState.RECOVERING and job.store.error is not None
    assert job.store.error["code"] in ("rank_lost", "child_killed") and job.store.checkpoints


def test_a_whole_node_that_dies_ends_the_attempt_and_a_smaller_gang_goes_on_from_its_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    job = GangOfNodes(tmp_path, base, max_steps=10_000)
    job.start()
    until(lambda: len(job.store.checkpoints) > 2)
    os.kill(job.children["n2"], signal.SIGKILL)
    job.end()
    assert job.store.state is JobState.RECOVERING
    last = job.store.checkpoints[-1]
    assert STATE_FILE in last.files
    again = GangOfNodes(tmp_path, base, {"n1": (0,)}, max_steps=10_000)
    object.__setattr__(again.store.given, "checkpoint", last)
    again.start()
    until(lambda: len(again.store.steps) > 2)
    again.store.wish = Wish.CANCEL
    again.driver.nudge()
    again.end()
    assert min(again.store.steps) == last.step + 1


def test_cancelling_ends_the_children_of_every_node(base: Path, tmp_path: Path) -> None:
    job = GangOfNodes(tmp_path, base, max_steps=10_000)
    job.start()
    until(lambda: bool(job.store.steps))
    job.store.wish = Wish.CANCEL
    job.driver.nudge()
    job.end()
    assert job.store.state is JobState.CANCELLED


def test_the_largest_part_leads(base: Path, tmp_path: Path) -> None:
    given = GangOfNodes(tmp_path, base, {"a": (3,), "c": (0, 1), "b": (0, 1)}).store.given
    assert parts_of(given) == [Part("b", (0, 1), 0), Part("c", (0, 1), 2), Part("a", (3,), 4)]


def test_ranks_meet_on_the_interface_that_has_the_nodes_address() -> None:
    assert meeting_over("127.0.0.1") == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert meeting_over(None)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.skipif(ability().mode is None, reason=f"no sandbox here: {ability().problem}")
def test_in_sandboxes_they_meet_over_the_nodes_network(on_one_node: GangOfNodes, base: Path) -> None:
    root = Path(tempfile.mkdtemp(prefix="gang"))
    root.chmod(0o755)  # the tenant's user must come through
    try:
        job = GangOfNodes(root, base, isolation=Isolation.REQUIRED).run()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    assert job.store.state is JobState.SUCCEEDED, job.store.error
    assert job.losses == on_one_node.losses


def test_a_child_without_rank_0_stores_nothing(tmp_path: Path) -> None:
    """It would write over what rank 0's node stores."""
    task = WorkerTask(
        "j", 1, "t1", "f" * 64, "python", str(tmp_path), {"output_dir": str(tmp_path), "first_rank": 1}, "", 1,
        DriverSettings(str(tmp_path)),
    )  # fmt: skip
    worker = Worker(task, NoDriver(), ObjectStore(str(tmp_path)))  # type: ignore[arg-type]
    for message in ({"type": "checkpoint"}, {"type": "finished"}, {"type": "ack", "command": "stop"}):
        with pytest.raises(JobFailure) as caught:
            worker._hear(message, None, None)  # type: ignore[arg-type]
        assert caught.value.code == "protocol_violation"


class NoDriver: ...


def test_a_node_that_cannot_be_prepared_ends_the_attempt_though_another_is_still_at_it(
    base: Path, tmp_path: Path
) -> None:
    job = GangOfNodes(tmp_path, base)
    job.agents.nodes["n1"].hold.clear()
    job.agents.nodes["n2"].fails = EnvironmentError_("numpy 1 and 2", code="environment_unsolvable")
    try:
        job.run()
    finally:
        job.agents.nodes["n1"].hold.set()
    assert job.store.state is JobState.FAILED


def test_who_only_knows_that_another_is_gone_waits_for_that_ones_word(base: Path, tmp_path: Path) -> None:
    job = GangOfNodes(tmp_path, base)
    job.driver._tasks = {"n1": None, "n2": None, "n3": None}  # type: ignore[dict-item]
    gone = {"code": "rank_lost"}
    hearsay, word = (
        Outcome(JobState.RECOVERING, "", gone),
        Outcome(JobState.FAILED, "", {"code": "memory_limit_exceeded"}),
    )
    for outcome in (hearsay, Outcome(JobState.RECOVERING, "the worker group was lost"), word):
        job.driver._outcomes.put(outcome)
    assert job.driver._first_hand(hearsay) is word


def test_one_that_releases_without_end_fills_no_memory(base: Path, tmp_path: Path) -> None:
    talk = GangOfNodes(tmp_path, base).driver._conversation
    flood = [{"type": "release", "action": 1, "at": 0.0}] * 5000
    talk.relay(flood)
    talk.with_companions(["n2"])
    talk.relay(flood)
    assert len(talk.relay_companion("n2", [])) == MAX_WAITING_ORDERS and talk.relay_companion("n2", []) == []
