"""What a sandbox costs at the start of a process: Python (`-S`, nothing imported) started plain and inside, alternating, until its
first word has arrived; and once a worker, to find out what the host can do. Where the host has control groups, each sandbox is
in one. Writes benchmarks/results/sandbox.json."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.hardware import hardware
from runtime_envs.sandbox.cgroup import here, planned
from runtime_envs.sandbox.host import ability
from runtime_envs.sandbox.process import prepared
from runtime_envs.sandbox.seccomp import program
from runtime_envs.sandbox.spec import GIB, Mode, Sandbox

REPEATS = 40
LIMIT_MS = 100.0
PROGRAM = [sys.executable, "-S", "-c", "import os; os.write(1, b'.'); os.read(0, 1)"]
RESULT = Path(__file__).parent / "results" / "sandbox.json"
UID = 31_000


def main() -> int:
    started = time.perf_counter()
    found, group = ability(), here()
    first_ms = 1000 * (time.perf_counter() - started)
    if found.mode is None:
        print(f"no sandbox here: {found.problem}; {found.remedy}")
        return 1
    pairs = [(plain_ms(), inside_ms(found.mode)) for _ in range(REPEATS)]
    plain, inside = (statistics.median(column) for column in zip(*pairs, strict=True))
    more = statistics.median(inside - plain for plain, inside in pairs)
    result = {
        "mode": found.mode,
        "filter": program() is not None,
        "cgroup": None if group is None else group.version,
        "repeats": REPEATS,
        "plain_ms": round(plain, 1),
        "inside_ms": round(inside, 1),
        "more_ms": round(more, 1),
        "once_a_worker_ms": round(first_ms, 1),
        "hardware": hardware(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"a start in the sandbox takes {more:.1f} ms more ({inside:.1f} against {plain:.1f} ms), wanted: {LIMIT_MS:.0f}"
    )
    return 0 if more <= LIMIT_MS else 1


def plain_ms() -> float:
    started = time.perf_counter()
    return _until_it_speaks(PROGRAM, (), started)


def inside_ms(mode: Mode) -> float:
    started = time.perf_counter()
    group = planned("bench", GIB, 64).make()
    try:
        with prepared(Sandbox(uid=UID, python=Path(sys.executable)), mode) as box:
            return _until_it_speaks([*group.command, *box.command, *PROGRAM], box.fds, started)
    finally:
        group.remove()


def _until_it_speaks(command: list[str], fds: tuple[int, ...], started: float) -> float:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds, env={})
    with process:
        assert process.stdout is not None and process.stdout.read(1) == b"."
        return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
