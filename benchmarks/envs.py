"""How fast tenants' conda environments are made, checked, imported and carried elsewhere: about 100 packages with torch, from a
local channel over HTTP, against `cp -a`, `python -m venv` with pip, conda-pack, `find` and `sha256sum`. Wheels and channel are kept in
--work for the next run; `--resume` goes on after the last part that was finished. Ratios are of medians of alternating repeats.
Writes benchmarks/results/envs.json and envs.md."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.hardware import ROOT, hardware
from runtime_envs.bundles.contents import export_bundle, import_bundle
from runtime_envs.bundles.fetch import Places
from runtime_envs.bundles.on_node import no_storage
from runtime_envs.bundles.signing import SigningKey, Trust
from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import find_interpreter
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.index import PipIndex
from runtime_envs.lock import Solved
from runtime_envs.materialize import Prepared
from runtime_envs.policy import EnvironmentPolicy
from runtime_envs.usage import disk_bytes
from runtime_envs.verify import full_verify, quick_verify, read_manifest

BASE = ["torch==2.13.0", "transformers", "peft", "accelerate", "deepspeed", "safetensors"]
TENANT = [
    "pandas", "datasets", "matplotlib", "hypothesis", "jsonschema", "psycopg", "uvicorn", "httpx", "typer", "fastapi",
    "sqlalchemy", "cryptography", "tabulate", "einops", "termcolor", "tenacity", "cachetools", "ujson", "zstandard",
    "tomlkit", "more-itertools", "colorama", "humanize", "python-dotenv", "websockets", "prompt-toolkit", "pluggy",
    "iniconfig", "sentencepiece", "absl-py", "msgpack",
]  # fmt: skip
LEFT_OUT = ["matplotlib", "hypothesis", "jsonschema", "psycopg", "uvicorn"]
ADDED = ["orjson", "sse-starlette", "gguf", "alembic", "toml"]
"""Each second tenant is without one of those and with one of these, which the node has never seen."""
REPEATS = len(LEFT_OUT)
ROUNDS = 2
"""Of what takes minutes."""
REMOVED = "removed-"
IMPORT = "import torch, transformers, peft"
RESULTS = ROOT / "benchmarks" / "results"
WORK = Path(os.environ.get("BENCH_ENVS_WORK") or Path.home() / ".cache" / "heliostat-bench-envs")
"""Wheels and channel, kept for the next run."""


@dataclass
class Report:
    """`seconds` by what was done. Kept in `file` after each part."""

    file: Path
    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        os.sync()  # what was removed or written before is not ours
        started = time.perf_counter()
        done = work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        print(f"{name}: {self.seconds[name][-1]:.2f} s", flush=True)
        return done

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def part(self, name: str, work: Callable[[], Any]) -> None:
        if name not in self.done:
            work()
            self.done.append(name)
            kept = {"seconds": self.seconds, "facts": self.facts, "done": self.done}
            self.file.write_text(json.dumps(kept))


@dataclass(frozen=True)
class Bench:
    work: Path
    report: Report
    places: CondaPlaces
    conda_pack: Path | None

    def node(self, name: str = "node") -> Environments:
        return Environments(self.work / name, self.places.index)

    def solved(self, *packages: str) -> Solved:
        solved: Solved = self.report.time("solve", lambda: solve_environment(spec(packages), self.places))
        return solved

    def made(self) -> Prepared:
        return self.node().materialize(solve_environment(spec(TENANT), self.places).lock)

    def _materialize(self, lock: dict[str, Any]) -> Prepared:
        return self.node().materialize(lock)

    def first(self) -> None:
        """Both from nothing, but for the solved base."""
        for _ in range(ROUNDS):
            solved = self.solved(*TENANT)
            clear(self.work / "node", self.work)
            made = self.report.time("first on a node", partial(self._materialize, solved.lock))
            self.report.facts["first_stages_s"] = {name: round(value, 2) for name, value in made.stages.items()}
            self._venv()

    def _venv(self) -> None:
        folder, wheels = self.work / "venv", self.work / "wheels"

        def make() -> None:
            run(sys.executable, "-m", "venv", folder)
            run(folder / "bin" / "pip", "install", "--quiet", "--no-index", "--find-links", wheels, *BASE, *TENANT)

        self.report.time("venv and pip", make)
        clear(folder, self.work)

    def second_tenants(self) -> None:
        first = self.made()
        for left_out, added in zip(LEFT_OUT, ADDED, strict=True):
            self._second(first, [*(name for name in TENANT if name != left_out), added])

    def _second(self, first: Prepared, packages: list[str]) -> None:
        solved = self.solved(*packages)
        before = disk_bytes(self.work / "node")
        made = self.report.time("second tenant", lambda: self.node().materialize(solved.lock))
        assert "manifest" in made.stages, "it was there already"
        extra_mb = round((disk_bytes(self.work / "node") - before) / 1e6, 1)
        self.report.facts.setdefault("extra_mb", []).append(extra_mb)
        self.report.facts["second_stages_s"] = {name: round(value, 2) for name, value in made.stages.items()}
        self.report.time("cp -a", lambda: run("cp", "-a", first.prefix, self.work / "copy"))
        clear(self.work / "copy", self.work)
        self.report.time("import, fresh", lambda: run(made.python, "-c", IMPORT))
        self.report.time("import, used", lambda: run(first.python, "-c", IMPORT))

    def checks(self) -> None:
        made, facts = self.made(), self.report.facts
        home, prefix = made.prefix.parent, str(made.prefix)
        facts["packages"] = len(list((made.prefix / "conda-meta").glob("*.json")))
        facts["files"] = len(json.loads(read_manifest(home))["files"])
        facts["prefix_gb"] = round(disk_bytes(made.prefix) / 1e9, 2)
        find = ("find", prefix, "-type", "f", "-printf", "%s %T@\n")
        sums = f"find {prefix} -type f -print0 | xargs -0 -n 256 -P $(nproc) sha256sum"
        for _ in range(REPEATS):
            self.report.time("quick check", lambda: expect_nothing(quick_verify(home)))
            self.report.time("find", lambda: run(*find))
            self.report.time("full check", lambda: expect_nothing(full_verify(home)))
            self.report.time("sha256sum", lambda: run("sh", "-c", sums))

    def bundles(self) -> None:
        """To a node that has the base, as theirs to an empty folder."""
        made, solved = self.made(), solve_environment(spec(TENANT), self.places)
        clear(self.work / "other", self.work)
        self.node("other").materialize(solve_environment(spec(()), self.places).lock)
        for number in range(ROUNDS):
            bundle = self.work / f"bundle-{number}.tar.gz"
            self.report.time("bundle", partial(self._export, solved, bundle))
            self.report.facts["bundle_mb"] = round(bundle.stat().st_size / 1e6)
            self.report.time("restore", partial(self._restore, bundle))
            clear(self.work / "other" / "envs" / solved.fingerprint, self.work)
            bundle.unlink()
            if self.conda_pack:
                self._theirs(made, self.conda_pack)

    def _export(self, solved: Solved, target: Path) -> None:
        places = Places(self.places.index, no_storage)
        export_bundle(target, (spec(TENANT), solved.lock), self._key(), places, whole=False)

    def _restore(self, bundle: Path) -> None:
        folder = self.work / "unpacked"
        with bundle.open("rb") as source:
            found = import_bundle(source, folder, Trust(self._key().public(), {}), self.places)
        found.solved.lock["bundled"] = {name: name for name in found.files}

        def fetch(key: str, target: Path, sha256: str) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.files[key], target)

        Environments(self.work / "other", self.places.index, fetch=fetch).materialize(found.solved.lock)
        shutil.rmtree(folder)

    def _key(self) -> SigningKey:
        return SigningKey(self.work / "bundles.pem")

    def _theirs(self, made: Prepared, conda_pack: Path) -> None:
        archive, folder = self.work / "packed.tar.gz", self.work / "unpacked"
        environment = {**os.environ, "PYTHONPATH": str(conda_pack)}
        command = [sys.executable, "-m", "conda_pack.cli", "--quiet", "--prefix", str(made.prefix)]
        command += ["--output", str(archive), "--ignore-missing-files"]
        self.report.time(
            "conda-pack, pack",
            lambda: subprocess.run(command, check=True, env=environment),
        )
        self.report.facts["conda_pack_mb"] = round(archive.stat().st_size / 1e6)
        folder.mkdir()

        def unpack() -> None:
            run("tar", "-xzf", archive, "-C", folder)
            run(folder / "bin" / "python", folder / "bin" / "conda-unpack")

        self.report.time("conda-pack, unpack", unpack)
        archive.unlink()
        clear(folder, self.work)


def spec(packages: Any) -> str:
    lines = "".join(f"\n  - {package}" for package in packages)
    return f"name: bench\nbase: cpu\ndependencies:{lines or ' []'}\n"


def clear(folder: Path, work: Path) -> None:
    """Out of the way, to be removed at the end. For five minutes ext4 steps over each inode that has just been freed, one by one,
    when a file is made: what comes after the removal of 100,000 files takes three times the processor time."""
    if folder.exists():
        folder.rename(Path(tempfile.mkdtemp(dir=work, prefix=REMOVED)) / folder.name)


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def expect_nothing(damaged: list[str]) -> None:
    assert damaged == [], damaged[:3]


def make_channel(work: Path, names: list[str]) -> Path:
    """Once: pip's wheels of this machine's index, and the channel from them. Raises `CalledProcessError` without an index."""
    channel, wheels, made_of = work / "channel", work / "wheels", work / "channel-of.json"
    if not made_of.is_file() or json.loads(made_of.read_text()) != names:
        constraints = ROOT / "constraints" / "cpu.txt"
        options = ("-c", constraints, "--find-links", wheels, "--wheel-dir", wheels)
        wheels.mkdir(exist_ok=True)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, *names)
        made = build_channel(channel, sorted(wheels.glob("*.whl")), find_interpreter(Path(sys.executable)))
        assert made.missing == (), made.missing
        made_of.write_text(json.dumps(names))
    return channel


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """By a process of its own: in ours it would take turns with what is measured."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _until_it_answers(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def _until_it_answers(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def table(report: Report) -> list[tuple[str, str, str]]:
    """What, measured, wanted."""
    seconds, extra = report.median, report.facts["extra_mb"]

    def times(slow: str, fast: str) -> str:
        return f"{seconds(slow) / seconds(fast):.1f}× ({seconds(fast):.2f} s against {seconds(slow):.2f} s)"

    def against(ours: str, theirs: str) -> str:
        return f"{seconds(ours) / seconds(theirs):.2f}× ({seconds(ours):.2f} s against {seconds(theirs):.2f} s)"

    return [
        ("second tenant against `cp -a`", times("cp -a", "second tenant"), "≥ 15× [≤ 1.5 s]"),
        ("its extra disk", f"{statistics.median(extra):.1f} MB (the most of {len(extra)}: {max(extra):.1f})", "≤ 25 MB"),
        ("first on a node against venv and pip", times("venv and pip", "first on a node"), "≥ 10× [≤ 9 s]"),
        ("solve", f"{seconds('solve'):.2f} s", "[≤ 0.1 s]"),
        ("quick check against `find`", against("quick check", "find"), "≤ 2× [≤ 0.3 s]"),
        ("full check against parallel `sha256sum`", against("full check", "sha256sum"), "≤ 1.5×"),
        ("first import, fresh against used", against("import, fresh", "import, used"), "≤ 1.25×"),
        *([("bundle against conda-pack's", times("conda-pack, pack", "bundle"), "≥ 8× [3 s]"),
           ("restore against conda-pack's", times("conda-pack, unpack", "restore"), "≥ 8× [2 s]")]
          if "conda-pack, pack" in report.seconds else []),
    ]  # fmt: skip


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
    parser.add_argument("--conda-pack", type=Path, help="The folder that it is installed in.")
    parser.add_argument("--resume", action="store_true", help="Go on after the last part that was finished.")
    asked = parser.parse_args()
    work: Path = asked.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    channel, progress = make_channel(work, [*BASE, *TENANT, *ADDED]), work / "progress.json"
    resumed = json.loads(progress.read_text()) if asked.resume and progress.is_file() else {}
    for stale in ("copy", "venv", "unpacked", "other", *(() if resumed else ("node", "cache"))):
        clear(work / stale, work)
    with served(channel) as url:
        index = PipIndex(offline=True, cache_dir=work / "uv")
        places = CondaPlaces(EnvironmentPolicy({"conda-forge": url}), work / "cache", index)
        bench = Bench(work, Report(progress, **resumed), places, asked.conda_pack)
        solve_environment(spec(TENANT), places)  # the base, once for a channel
        for part in (bench.first, bench.second_tenants, bench.checks, bench.bundles):
            bench.report.part(part.__name__, part)
    print(record(bench.report))
    progress.unlink()
    for removed in work.glob(f"{REMOVED}*"):
        shutil.rmtree(removed)


if __name__ == "__main__":
    main()
