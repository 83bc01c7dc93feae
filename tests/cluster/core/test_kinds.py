from __future__ import annotations

import pytest
from ray.util.accelerators import accelerators

from cluster.core.kinds import KINDS, family, kind_of_device, matches, memory_gb, resolve_kind
from cluster.errors import InvalidRequest


@pytest.mark.parametrize(
    ("asked", "canonical"),
    [("a100", "A100"), (" H100 ", "H100"), ("CPU", "cpu"), ("a100-80gb", "A100-80GB"), ("A100-40G", "A100-40GB")],
)
def test_any_case_is_understood(asked: str, canonical: str) -> None:
    assert resolve_kind(asked) == canonical


def test_an_unknown_kind_names_the_nearest_and_the_list() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_kind("A1000")
    error = caught.value
    assert (error.code, error.param) == ("unknown_gpu_type", "resource_config.gpu_type")
    assert error.hint is not None
    assert "Did you mean A100?" in error.hint
    assert all(kind in error.hint for kind in KINDS)


def test_an_unlike_kind_suggests_nothing() -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve_kind("§§§§")
    assert caught.value.hint is not None
    assert "Did you mean" not in caught.value.hint


@pytest.mark.parametrize(
    ("asked", "node", "expected"),
    [
        ("A100", "A100-40GB", True),
        ("A100", "A100-80GB", True),
        ("A100", "A100", True),
        ("A100-80GB", "A100-80GB", True),
        ("A100-80GB", "A100-40GB", False),
        ("A100-80GB", "A100", False),
        ("H20", "H200", False),
        ("cpu", "A100", False),
        ("cpu", "cpu", True),
    ],
)
def test_a_family_matches_its_variants_and_a_variant_itself(asked: str, node: str, expected: bool) -> None:
    assert matches(asked, node) is expected


@pytest.mark.parametrize(
    ("kind", "gib"),
    [("A100", 40), ("A100-80GB", 80), ("H100", 80), ("H200", 141), ("cpu", None), ("GeForce-RTX-4090", None)],
)
def test_memory_of_a_kind_is_that_of_its_smallest(kind: str, gib: float | None) -> None:
    assert memory_gb(kind) == gib


@pytest.mark.parametrize(
    ("device", "gib", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", 40.0, "A100-40GB"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100-80GB"),
        ("NVIDIA H100 NVL", 93.6, "H100-94GB"),
        ("NVIDIA H200", 140.4, "H200"),
        ("Tesla V100-SXM2-32GB", 32.0, "V100-32GB"),
        ("Tesla T4", 15.0, "T4"),
        ("NVIDIA A10G", 22.5, "A10G"),
        ("NVIDIA GB200", 185.0, "GB200"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 4090", 24.0, "GeForce-RTX-4090"),
    ],
)
def test_devices_are_recognised_by_what_their_driver_calls_them(device: str, gib: float, kind: str) -> None:
    assert kind_of_device(device, gib) == kind


def test_every_nvidia_and_amd_instinct_name_of_ray_is_known() -> None:
    names = {
        value
        for name, value in vars(accelerators).items()
        if isinstance(value, str) and name.startswith(("NVIDIA_", "AMD_INSTINCT_"))
    }
    assert names
    assert {resolve_kind(name) for name in names} <= set(KINDS)


def test_every_variant_has_its_family_in_the_catalogue() -> None:
    assert all(family(kind) in KINDS for kind in KINDS)
