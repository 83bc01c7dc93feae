"""How fast tenants' conda environments are made, checked and imported: about 100 packages with torch, from a local channel over HTTP,
against `cp -a`, `python -m venv` with pip, `find` and `sha256sum`. Wheels and channel are kept in --work for the next run. Ratios
are of medians of alternating repeats. Writes benchmarks/results/envs.json and envs.md."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT, hardware
from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import find_interpreter
from runtime_envs.conda.solve import CondaPlaces, CondaPolicy
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.index import PipIndex
from runtime_envs.lock import Solved
from runtime_envs.materialize import Prepared
from runtime_envs.usage import disk_bytes
from runtime_envs.verify import full_verify, quick_verify

BASE = ["torch==2.13.0", "transformers", "peft", "accelerate", "deepspeed", "safetensors"]
TENANTS = [
    "pandas", "matplotlib", "datasets", "scikit-learn", "gguf", "httpx", "typer", "fastapi", "sqlalchemy", "boto3",
    "alembic", "jsonschema", "orjson", "uvicorn", "cryptography", "hypothesis", "psycopg", "sse-starlette",
]  # fmt: skip
LEFT_OUT = ["matplotlib", "gguf", "boto3", "alembic", "hypothesis"]
"""One by each second tenant: nothing else needs them, so that the environments differ."""
REPEATS = len(LEFT_OUT)
IMPORT = "import torch, transformers, peft"
RESULTS = ROOT / "benchmarks" / "results"
WORK = Path(os.environ.get("BENCH_ENVS_WORK") or Path.home() / ".cache" / "heliostat-bench-envs")
"""Wheels and channel, kept for the next run."""


@dataclass
class Report:
    """`seconds` by what was done; `wanted`: what of it, over what, and the ratio to reach."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        done = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return done

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


@dataclass(frozen=True)
class Bench:
    work: Path
    report: Report
    places: CondaPlaces
    node: Environments

    def solved(self, *packages: str) -> Solved:
        lines = "".join(f"  - {package}\n" for package in packages)
        text = f"name: bench\nbase: cpu\ndependencies:\n{lines}"
        solved: Solved = self.report.time("solve", lambda: solve_environment(text, self.places))
        return solved

    def first(self) -> Prepared:
        solved = self.solved(*TENANTS)
        self.report.facts["packages"] = len(solved.lock["conda"])
        made: Prepared = self.report.time("first on a node", lambda: self.node.materialize(solved.lock))
        self.report.facts["files"] = len(json.loads((made.prefix.parent / "manifest.json").read_bytes())["files"])
        self.report.facts["prefix_gb"] = round(disk_bytes(made.prefix) / 1e9, 2)
        self.report.facts["first_stages_s"] = {name: round(value, 2) for name, value in made.stages.items()}
        return made

    def another(self, number: int, first: Prepared) -> None:
        """Other packages each time: all but one."""
        solved = self.solved(*(name for name in TENANTS if name != LEFT_OUT[number]))
        before = disk_bytes(self.work / "node")
        made = self.report.time("second tenant", lambda: self.node.materialize(solved.lock))
        assert "link" in made.stages, "it was there already"
        self.report.facts.setdefault("extra_mb", []).append(round((disk_bytes(self.work / "node") - before) / 1e6, 1))
        self.report.facts["second_stages_s"] = {name: round(value, 2) for name, value in made.stages.items()}
        copy = self.work / "copy"
        self.report.time("cp -a", lambda: run("cp", "-a", first.prefix, copy))
        shutil.rmtree(copy)
        self.report.time("import, fresh", lambda: run(made.python, "-c", IMPORT))
        self.report.time("import, used", lambda: run(first.python, "-c", IMPORT))

    def checks(self, made: Prepared) -> None:
        home, prefix = made.prefix.parent, str(made.prefix)
        find = ("find", prefix, "-type", "f", "-printf", "%s %T@\n")
        sums = f"find {prefix} -type f -print0 | xargs -0 -n 256 -P $(nproc) sha256sum"
        for _ in range(REPEATS):
            self.report.time("quick check", lambda: expect_nothing(quick_verify(home)))
            self.report.time("find", lambda: run(*find))
            self.report.time("full check", lambda: expect_nothing(full_verify(home)))
            self.report.time("sha256sum", lambda: run("sh", "-c", sums))

    def venv(self) -> None:
        folder, wheels = self.work / "venv", self.work / "wheels"
        names = [*BASE, *TENANTS]

        def make() -> None:
            run(sys.executable, "-m", "venv", folder)
            run(folder / "bin" / "pip", "install", "--quiet", "--no-index", "--find-links", wheels, *names)

        self.report.time("venv and pip", make)
        shutil.rmtree(folder)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def expect_nothing(damaged: list[str]) -> None:
    assert damaged == [], damaged[:3]


def make_channel(work: Path) -> Path:
    """Once: pip's wheels of this machine's index, and the channel from them."""
    channel, wheels = work / "channel", work / "wheels"
    if not (channel / "noarch" / "repodata.json").is_file():
        constraints = ROOT / "constraints" / "cpu.txt"
        names = [*BASE, *TENANTS]
        options = ("-c", constraints, "--find-links", wheels, "--wheel-dir", wheels)
        wheels.mkdir(exist_ok=True)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, *names)
        made = build_channel(channel, sorted(wheels.glob("*.whl")), find_interpreter(Path(sys.executable)))
        assert made.missing == (), made.missing
    return channel


class _Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def table(report: Report) -> list[tuple[str, str, str]]:
    """What, measured, wanted."""
    seconds = report.median

    def times(slow: str, fast: str) -> str:
        return f"{seconds(slow) / seconds(fast):.1f}× ({seconds(fast):.2f} s against {seconds(slow):.2f} s)"

    def against(ours: str, theirs: str) -> str:
        return f"{seconds(ours) / seconds(theirs):.2f}× ({seconds(ours):.2f} s against {seconds(theirs):.2f} s)"

    return [
        ("second tenant against `cp -a`", times("cp -a", "second tenant"), "≥ 15× [≤ 1.5 s]"),
        ("its extra disk, most of any", f"{max(report.facts['extra_mb']):.0f} MB", "≤ 25 MB"),
        ("second tenant against venv and pip", times("venv and pip", "second tenant"), "≥ 10×"),
        ("first on a node against venv and pip", times("venv and pip", "first on a node"), "[≤ 9 s]"),
        ("solve, with the start of its process", f"{seconds('solve'):.2f} s", "[≤ 0.1 s]"),
        ("quick check against `find`", against("quick check", "find"), "≤ 2× [≤ 0.3 s]"),
        ("full check against parallel `sha256sum`", against("full check", "sha256sum"), "≤ 1.5×"),
        ("first import, fresh against used", against("import, fresh", "import, used"), "≤ 1.25×"),
    ]


def record(report: Report) -> str:
    rows = "".join(f"| {' | '.join(row)} |\n" for row in table(report))
    facts = f"{report.facts['packages']} packages, {report.facts['files']} files, {report.facts['prefix_gb']} GB"
    text = f"| conda environments ({facts}) | measured | wanted |\n|---|---|---|\n{rows}\n{json.dumps(hardware())}\n"
    (RESULTS / "envs.md").write_text(text)
    seconds = {name: [round(one, 3) for one in values] for name, values in report.seconds.items()}
    whole = {"seconds": seconds, **report.facts, "hardware": hardware()}
    (RESULTS / "envs.json").write_text(json.dumps(whole, indent=1) + "\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    work = parser.parse_args().work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    channel = make_channel(work)
    for stale in ("node", "copy", "venv", "cache"):
        shutil.rmtree(work / stale, ignore_errors=True)
    with served(channel) as url:
        index = PipIndex(offline=True, cache_dir=work / "uv")
        places = CondaPlaces(CondaPolicy({"conda-forge": url}), work / "cache", index)
        bench = Bench(work, Report(), places, Environments(work / "node", index))
        bench.solved(*TENANTS)  # the base, once for a channel
        bench.report.seconds.clear()
        made = bench.first()
        for number in range(REPEATS):
            bench.another(number, made)
        bench.checks(made)
        bench.venv()
    print(record(bench.report))


if __name__ == "__main__":
    main()
