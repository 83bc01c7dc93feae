"""What this machine offers: accelerators as nvidia-smi names them, else `cpu` slots; declared values win."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.core.job import Node
from cluster.core.kinds import CPU, kind_of_device, memory_gb, resolve_kind
from cluster.errors import Unavailable
from cluster.ports import NodeSettings

GIB = 1024**3
CPU_SHARE = 0.8
"""Of the memory, for training; the rest is for Ray, the database and the system."""

_QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Gpu:
    device: str
    memory_gb: float


def detect(name: str, settings: NodeSettings) -> Node:
    """Raises `InvalidRequest` for a declared kind that is unknown, `Unavailable` when its GPUs do not answer."""
    declared = resolve_kind(settings.kind) if settings.kind else None
    gpus = [] if declared == CPU else list_gpus()
    kind = declared or (kind_of_device(gpus[0].device, gpus[0].memory_gb) if gpus else CPU)
    slots = settings.slots or len(gpus) or cpu_slots()
    memory = settings.memory_gb or _memory_per_slot(kind, slots, gpus)
    return Node(
        name=name,
        kind=kind,
        slots=slots,
        memory_gb=round(memory, 2),
        park_gb=round(_park_gb(kind, slots * memory, settings), 2),
        market=settings.market,
        region=settings.region,
        price=settings.price_per_hour,
    )


def _park_gb(kind: str, memory_gb: float, settings: NodeSettings) -> float:
    """On `cpu` a parked process keeps what it has of the slots' own memory, so half of that is for it at most; no child
    gives back an accelerator while it lives."""
    if kind != CPU:
        return 0.0
    return memory_gb / 2 if settings.park_gb is None else settings.park_gb


def _memory_per_slot(kind: str, slots: int, gpus: list[Gpu]) -> float:
    if gpus:
        return min(gpu.memory_gb for gpu in gpus)
    return memory_gb(kind) or machine_memory_gb() * CPU_SHARE / slots


def list_gpus() -> list[Gpu]:
    """In the order of their numbers; none where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise Unavailable(
            f"nvidia-smi failed on this node: {error}",
            hint="Run nvidia-smi there; or declare the node's kind as cpu to go without its GPUs.",
        ) from error
    return parse_gpus(answer.stdout)


def parse_gpus(listing: str) -> list[Gpu]:
    """`NVIDIA A100-SXM4-80GB, 81920` a line, MiB."""
    rows = [line.rsplit(",", 1) for line in listing.splitlines() if line.strip()]
    return [Gpu(device.strip(), round(float(mib) / 1024, 2)) for device, mib in rows]


def cpu_slots() -> int:
    """One for two physical cores: a slot trains with several threads."""
    return max(1, (psutil.cpu_count(logical=False) or 1) // 2)


def machine_memory_gb() -> float:
    """Of the machine, or of the container where that has less."""
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    total = float(psutil.virtual_memory().total)
    return (min(total, float(limit)) if limit.isdecimal() else total) / GIB
