"""What a figure was measured on, to stand beside it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil


def hardware() -> dict[str, Any]:
    """Processor, cores, memory (GiB), accelerators (none are looked for here), Python."""
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1024**3),
        "python": platform.python_version(),
    }
