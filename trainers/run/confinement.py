"""What the sandbox of a training child is made of, from the worker's task, or why there is none; and what a child may take of
its node."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cluster.detect import CPU_SHARE, machine_memory_gb
from cluster.errors import JobFailure, Unavailable
from runtime_envs.errors import EnvironmentProblem
from runtime_envs.sandbox.cgroup import Group
from runtime_envs.sandbox.devices import leased
from runtime_envs.sandbox.host import ability, needed
from runtime_envs.sandbox.spec import GIB, HOME, WORK, Isolation, Mode, Sandbox
from runtime_envs.sandbox.watch import folder_over, memory_over
from trainers.run.parts import WorkerTask
from trainers.run.preparing import OUT

KEEPER = "keeper"
"""Where a child that was started early is handed over."""
OURS = frozenset({OUT, KEEPER, "home", "work", "train"})
"""Below an attempt's scratch folder: what the child writes into, without a sandbox too, and Ray Train's own folder. All else
is there to be read."""
IMPORTS_GIB = 2.0
"""For each rank, above `mem_limit_gb`: what the imports take, which that limit leaves out."""
MAX_CACHE_BYTES = 4 * GIB
"""More than a well-behaved child keeps (1 GiB)."""
DISK_SHARE = 0.8
"""Of what is free: the rest is for the platform and for the others on the node."""
WRITABLE = (
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "MPLCONFIGDIR",
    "HF_HOME",
)
"""Libraries write into these; each gets a folder of its own."""


@dataclass(frozen=True)
class Confinement:
    """`mode` None: the child runs as a plain process. `note`: what the tenant and the operator should know about it."""

    mode: Mode | None
    sandbox: Sandbox | None = None
    note: str = ""

    def home(self, task: WorkerTask) -> Path:
        return HOME if self.sandbox else Path(task.scratch) / "home"


def confinement(task: WorkerTask) -> Confinement:
    """Makes the output folder and gives it to the tenant's user. Raises `Unavailable` (`isolation_unavailable`)."""
    try:
        mode = needed(task.settings.isolation)
    except EnvironmentProblem as problem:
        raise Unavailable(problem.message, code=problem.code, hint=problem.hint) from problem
    if mode is None:
        return Confinement(None, note=_warning(task.settings.isolation))
    uid = _uid(task, mode)
    output, cache = _writable(task)
    for folder in (output, cache):
        _given_to(uid, folder, mode)
    return Confinement(mode, _sandbox(task, uid))


def _warning(isolation: Isolation) -> str:
    if isolation is Isolation.OFF:
        return ""
    return f"this training is not isolated: {ability().problem} on its node"


def _uid(task: WorkerTask, mode: Mode) -> int:
    if mode is Mode.USERNS:
        return os.getuid()
    if task.uid is None:
        raise Unavailable(f"tenant {task.tenant} has no user id for its sandboxes", code="no_tenant_uid")
    return task.uid


def _given_to(uid: int, folder: Path, mode: Mode) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    if mode is Mode.ROOT:
        os.chown(folder, uid, uid)


def _sandbox(task: WorkerTask, uid: int) -> Sandbox:
    scratch = Path(task.scratch)
    return Sandbox(
        uid=uid,
        python=Path(task.python),
        read_only=(*given(scratch), Path(task.config["base_model"])),
        writable=_writable(task),
        folders=(HOME, WORK, *(HOME / name.lower() for name in WRITABLE)),
        network=task.address is not None,
        devices=leased(_indexes(task)).files,
        limits=task.settings.sandbox,
    )


def _writable(task: WorkerTask) -> tuple[Path, Path]:
    """Its output, and what its tenant keeps on this node."""
    return Path(task.config["output_dir"]), Path(task.config["cache_dir"])


def given(scratch: Path) -> list[Path]:
    """What the child may read of its attempt's folder."""
    return [place for place in sorted(scratch.iterdir()) if place.name not in OURS]


def visible(task: WorkerTask, confined: Confinement) -> str:
    """CUDA_VISIBLE_DEVICES of the child."""
    return leased(_indexes(task)).visible if confined.sandbox else task.visible_devices


def _indexes(task: WorkerTask) -> list[int]:
    return [int(index) for index in task.visible_devices.split(",") if index]


@dataclass(frozen=True)
class NodeShare:
    """What a child may take of its node: bytes of memory, of all its processes; bytes of disk, below its output folder. `cache`:
    what its tenant keeps here, which is thrown away when it grows too large: no job of the tenant needs it."""

    memory_bytes: int
    disk_bytes: int
    cache: Path | None = None

    def exceeded(self, pid: int, output: Path, group: Group) -> JobFailure | None:
        if group.overran():
            return self.killed()
        if used := memory_over(pid, self.memory_bytes):
            return _too_much_memory(
                f"the training took {used / GIB:.1f} GiB of the node's memory; its part is {self.memory_bytes / GIB:.1f} GiB"
            )
        if self.cache and folder_over(self.cache, MAX_CACHE_BYTES):
            shutil.rmtree(self.cache, ignore_errors=True)
        if folder_over(output, self.disk_bytes):
            return JobFailure(
                f"the training wrote more than its part of the node's disk, {self.disk_bytes / GIB:.1f} GiB",
                code="disk_limit_exceeded",
                hint="Training code must keep few and small files; checkpoints of this size need a node with more disk.",
            )
        return None

    def killed(self) -> JobFailure:
        """By the kernel, which let it have no more than its part."""
        return _too_much_memory(
            f"the training wanted more than its part, {self.memory_bytes / GIB:.1f} GiB of the node's memory"
        )


def _too_much_memory(message: str) -> JobFailure:
    return JobFailure(
        message,
        code="memory_limit_exceeded",
        hint="Lower batch_size or max_seq_len, ask for more slots, or raise mem_limit_gb if it is set.",
    )


def node_share(task: WorkerTask) -> NodeShare:
    """Of the disk: most of what is free before it starts."""
    output = Path(task.config["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    disk = int(shutil.disk_usage(output).free * DISK_SHARE)
    cache = Path(task.config["cache_dir"])
    cache.mkdir(parents=True, exist_ok=True)
    return NodeShare(memory_share(task), disk, cache)


def memory_share(task: WorkerTask) -> int:
    """On `cpu`: that of its slots, and not much above what it was promised to stay below; beside GPUs: what the platform can
    spare."""
    if task.memory_gb is None:
        return int(machine_memory_gb() * CPU_SHARE * GIB)
    asked = task.config.get("memory_limit_gb")
    within = task.memory_gb if asked is None else (asked + IMPORTS_GIB) * task.config["node_ranks"]
    return int(min(within, task.memory_gb) * GIB)
