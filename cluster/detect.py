"""What this machine offers: accelerators as nvidia-smi names them, else `cpu` slots; declared values win."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
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
_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


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
    """One for two physical cores that this process may use: a slot trains with several threads."""
    return max(1, min(psutil.cpu_count(logical=False) or 1, usable_cpus()) // 2)


def machine_memory_gb() -> float:
    """Of the machine, or of the container or control group where that has less."""
    return min([psutil.virtual_memory().total, *_memory_limits()]) / GIB


def usable_cpus() -> int:
    """Processors that this process may run on: by its affinity, and by the quota of its container or control group."""
    return max(1, min([len(os.sched_getaffinity(0)), *_cpu_limits()]))


def computes_in_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bf16, with which `trainers.child.model.resolve_precision` trains on it."""
    flags = _read(cpuinfo)
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _memory_limits() -> Iterator[int]:
    """Bytes. Version 1 says a number that is larger than any machine where there is none."""
    for folder in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (limit := _read(folder / name)).isdecimal():
                yield int(limit)


def _cpu_limits() -> Iterator[int]:
    """Whole processors: what runs on a part of one holds all others up."""
    for folder in _groups("cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not period:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) // int(period)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the control group that this process is in, and of all above it. Their files say "max" (version 2) or -1 (version 1)
    where there is no limit."""
    for line in _OWN_GROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top = _GROUPS / controller
        elif not controllers:
            top = _GROUPS
        else:
            continue
        # A container may see its own group as the top one, under the path that it has outside.
        yield from (top, *(top / above for above in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents)))


def _read(file: Path) -> str:
    return file.read_text().strip() if file.is_file() else ""
