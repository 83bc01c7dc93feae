"""The catalogue of accelerator kinds: Ray's names, memory variants, which asked name a node's kind satisfies. Pure."""

from __future__ import annotations

import difflib
import re

from cluster.errors import InvalidRequest

CPU = "cpu"

MEMORY_GB: dict[str, float] = {
    "A100-40GB": 40,
    "A100-80GB": 80,
    "A10G": 24,
    "AMD-Instinct-MI100": 32,
    "AMD-Instinct-MI210": 64,
    "AMD-Instinct-MI250X": 128,
    "AMD-Instinct-MI250X-MI250": 128,
    "AMD-Instinct-MI300A": 128,
    "AMD-Instinct-MI300X-HF": 192,
    "AMD-Instinct-MI300X-OAM": 192,
    "AMD-Instinct-MI308X": 192,
    "AMD-Instinct-MI325X-OAM": 256,
    "AMD-Instinct-MI350X-OAM": 288,
    "AMD-Instinct-MI355X-OAM": 288,
    "B200": 180,
    "B300": 270,
    "GB200": 186,
    "GB300": 279,
    "H100-80GB": 80,
    "H100-94GB": 94,
    "H20": 96,
    "H200": 141,
    "K80": 12,
    "L4": 24,
    "L40S": 48,
    "P100-12GB": 12,
    "P100-16GB": 16,
    "P4": 8,
    "RTX-PRO-6000": 96,
    "T4": 16,
    "V100-16GB": 16,
    "V100-32GB": 32,
}
"""GiB of one accelerator, by kind; a node says what its own really have."""

_VARIANT = re.compile(r"^(?P<family>.+)-(?P<gb>\d+)GB?$", re.IGNORECASE)


def family(kind: str) -> str:
    """`A100-80GB` → `A100`; a kind without memory variants is its own family."""
    found = _VARIANT.match(kind)
    return found["family"] if found else kind


KINDS: tuple[str, ...] = (CPU, *sorted(MEMORY_GB.keys() | {family(kind) for kind in MEMORY_GB}))
"""Every name that a request may use, in its canonical spelling."""

_BY_LOWER = {kind.lower(): kind for kind in KINDS}


def resolve_kind(name: str) -> str:
    """The canonical spelling of a name in any case; `A100-80G`, as Ray writes it, is `A100-80GB`.

    Raises `InvalidRequest` (`unknown_gpu_type`)."""
    wanted = name.strip().lower()
    found = _BY_LOWER.get(wanted) or (_BY_LOWER.get(f"{wanted}b") if _VARIANT.match(wanted) else None)
    if found is None:
        raise _unknown(name)
    return found


def _unknown(name: str) -> InvalidRequest:
    close = difflib.get_close_matches(name.strip().lower(), _BY_LOWER, n=1, cutoff=0.5)
    suggestion = f"Did you mean {_BY_LOWER[close[0]]}? " if close else ""
    return InvalidRequest(
        f"unknown GPU type {name!r}",
        code="unknown_gpu_type",
        param="resource_config.gpu_type",
        hint=f"{suggestion}Known types: {', '.join(KINDS)}.",
    )


def matches(asked: str, node_kind: str) -> bool:
    """Both canonical. A family matches each of its variants; a variant only itself."""
    return asked == node_kind or asked == family(node_kind)


def memory_gb(kind: str) -> float | None:
    """GiB of one accelerator of that kind; of a family, its smallest; None for `cpu` and unknown kinds (nodes say)."""
    sizes = [size for name, size in MEMORY_GB.items() if matches(kind, name)]
    return min(sizes, default=None)


def kind_of_device(device: str, device_memory_gb: float) -> str:
    """The kind of a GPU from the name and memory that its driver reports (`NVIDIA A100-SXM4-80GB`, 80.0).

    An accelerator that the catalogue lacks keeps its own name: it serves jobs that ask for no kind."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    names = [name for name in KINDS if name != CPU and name == family(name) and _has_words(words, name)]
    if not names:
        return words.removeprefix("NVIDIA-")
    name = max(names, key=len)
    variants = [kind for kind in MEMORY_GB if kind != name and family(kind) == name]
    return min(variants, key=lambda kind: abs(MEMORY_GB[kind] - device_memory_gb), default=name)


def _has_words(words: str, name: str) -> bool:
    return f"-{name.lower()}-" in f"-{words.lower()}-"
