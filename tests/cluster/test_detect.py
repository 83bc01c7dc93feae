from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from cluster import detect as detecting
from cluster.detect import Gpu, computes_in_bf16, cpu_slots, detect, machine_memory_gb, parse_gpus, usable_cpus
from cluster.errors import InvalidRequest, Unavailable
from cluster.ports import NodeSettings
from trainers.child.model import resolve_precision
from trainers.config import TrainConfig

EIGHT_A100 = "NVIDIA A100-SXM4-80GB, 81920\n" * 8


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvidia-smi that prints what lies in a file beside it."""
    program, said = tmp_path / "nvidia-smi", tmp_path / "said"
    program.write_text(f'#!/bin/sh\nexec cat "{said}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return said


def _settings(tmp_path: Path, **declared: object) -> NodeSettings:
    return NodeSettings(root=tmp_path, storage_url=str(tmp_path / "objects"), **declared)  # type: ignore[arg-type]


def test_a_machine_with_gpus_offers_them(tmp_path: Path, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(EIGHT_A100)
    node = detect("n1", _settings(tmp_path))
    assert (node.name, node.kind, node.slots, node.memory_gb) == ("n1", "A100-80GB", 8, 80.0)


def test_gpus_that_do_not_answer_are_not_taken_for_none(tmp_path: Path, nvidia_smi: Path) -> None:
    with pytest.raises(Unavailable, match="nvidia-smi failed"):
        detect("n1", _settings(tmp_path))


def test_declared_cpu_leaves_the_gpus_alone(tmp_path: Path, nvidia_smi: Path) -> None:
    node = detect("n1", _settings(tmp_path, kind="CPU", slots=3, memory_gb=2.5))
    assert (node.kind, node.slots, node.memory_gb) == ("cpu", 3, 2.5)


def test_fewer_slots_than_gpus_may_be_declared(tmp_path: Path, nvidia_smi: Path) -> None:
    nvidia_smi.write_text(EIGHT_A100)
    assert detect("n1", _settings(tmp_path, slots=4)).slots == 4


def test_without_gpus_a_node_offers_cpu_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detecting, "list_gpus", list)
    node = detect("n1", _settings(tmp_path))
    assert (node.kind, node.slots) == ("cpu", cpu_slots())
    assert node.memory_gb == pytest.approx(machine_memory_gb() * 0.8 / node.slots, abs=0.01)


def test_a_declared_kind_brings_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detecting, "list_gpus", list)
    node = detect("n1", _settings(tmp_path, kind="h100", slots=2))
    assert (node.kind, node.slots, node.memory_gb) == ("H100", 2, 80.0)


def test_an_unknown_declared_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        detect("n1", _settings(tmp_path, kind="quantum"))


def test_the_listing_of_nvidia_smi() -> None:
    assert parse_gpus("Tesla T4, 15360\n\n") == [Gpu("Tesla T4", 15.0)]
    assert parse_gpus("") == []


def test_slots_are_half_the_physical_cores() -> None:
    assert cpu_slots() == max(1, min(psutil.cpu_count(logical=False) or 1, usable_cpus()) // 2)


def test_a_quota_leaves_fewer_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    monkeypatch.setattr(detecting, "_GROUPS", tmp_path)
    monkeypatch.setattr(detecting, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16)
    assert cpu_slots() == 2


@pytest.mark.parametrize(
    ("groups", "limited", "file"),
    [
        ("0::/\n", ".", "memory.max"),
        ("0::/system.slice/heliostat.service/leaf\n", "system.slice", "memory.max"),
        ("5:pids:/\n4:cpu,memory:/a/b\n0::/\n", "memory/a/b", "memory.limit_in_bytes"),
        ("4:memory:/docker/1f\n", "memory", "memory.limit_in_bytes"),
    ],
)
def test_a_container_has_the_memory_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limited: str, file: str
) -> None:
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(detecting, "_GROUPS", tmp_path)
    monkeypatch.setattr(detecting, "_OWN_GROUPS", tmp_path / "own")
    limit = tmp_path / limited / file
    limit.parent.mkdir(parents=True, exist_ok=True)
    limit.write_text(f"{1024**3}\n")
    assert machine_memory_gb() == 1.0
    for unlimited in ("max\n", "9223372036854771712\n"):
        limit.write_text(unlimited)
        assert machine_memory_gb() == psutil.virtual_memory().total / 1024**3


@pytest.mark.parametrize(
    ("groups", "limits", "cpus"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, 3),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("1:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("1:cpu,cpuacct:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("0::/\n", {"cpu.max": "900000 100000"}, 3),
    ],
)
def test_processors_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, str], cpus: int
) -> None:
    (tmp_path / "own").write_text(groups)
    monkeypatch.setattr(detecting, "_GROUPS", tmp_path)
    monkeypatch.setattr(detecting, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    assert usable_cpus() == cpus


def test_a_processor_has_bf16_where_a_training_finds_it(tmp_path: Path) -> None:
    config = TrainConfig(base_model="m", train_file="t", output_dir="o")
    assert computes_in_bf16() == (resolve_precision(config) == "bf16")
    for flags, able in (("fpu avx512f avx512_bf16", True), ("amx_bf16 amx_tile", True), ("fpu avx2 avx512f", False)):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
        assert computes_in_bf16(tmp_path / "cpuinfo") is able
    assert not computes_in_bf16(tmp_path / "none")
