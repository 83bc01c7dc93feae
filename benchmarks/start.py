"""From the grant of a job's slots to its first optimizer step, through whole Heliostats on one `cpu` slot each: with the training
process started by Ray's worker, by the node's agent at the grant, and by it while the job waited. The three alternate; medians."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.banking77 import BASE_MODEL, HYPERPARAMS, read_rows, upload  # noqa: E402
from benchmarks.hardware import hardware  # noqa: E402
from cluster.processes import MARK_VARIABLE  # noqa: E402
from examples.local_heliostat import Failed, Heliostat, find_gguf, steps_of  # noqa: E402

WAYS = {
    "worker": "Ray's worker starts it",
    "grant": "started at the grant",
    "ahead": "started while the job waited",
}
IMPORTED_S = 2.0
"""Without a second of processor time in between: its imports are done."""
LIMIT_S = 300.0


@dataclass
class Run:
    """Of one job, in seconds after its grant; `stages` as its events say them. `post_s`: from before the POST."""

    first_step_s: float = 0.0
    post_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


class Watched:
    """A job that is followed by a thread from its POST on."""

    def __init__(self, heliostat: Heliostat, body: dict[str, Any]) -> None:
        self._heliostat = heliostat
        self._posted = time.monotonic()
        self.id = str(heliostat.post("/finetune", body)["id"])
        self._granted = 0.0
        self.run = Run()
        self.trains = threading.Event()
        self._ended = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        for event in self._heliostat.events(self.id):
            data = event.get("data") or {}
            if event["type"] == "state" and data.get("to") == "preparing":
                self._granted = time.monotonic()
            elif event["type"] == "stage":
                self.run.stages[data["stage"]] = data["seconds"]
            elif steps_of(event) and not self.trains.is_set():
                self.run.first_step_s = time.monotonic() - self._granted
                self.run.post_s = time.monotonic() - self._posted
                self.trains.set()
        self._ended.set()

    def first_step(self) -> Run:
        """Raises Failed."""
        if not self.trains.wait(LIMIT_S):
            raise Failed(f"{self.id} has made no step in {LIMIT_S:.0f} s")
        return self.run

    def cancel(self) -> None:
        """Raises Failed."""
        self._heliostat.post(f"/finetune/{self.id}/cancel", {})

    def end(self) -> None:
        self.cancel()
        self._ended.wait(LIMIT_S)


def wait_for_imports(job_id: str) -> None:
    """Until the process that waits for this job computes nothing any more. Raises Failed."""
    deadline, spent, since = time.monotonic() + LIMIT_S, -1.0, time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = _processor_s(job_id)
        if now != spent:
            spent, since = now, time.monotonic()
        elif spent > 0 and time.monotonic() - since > IMPORTED_S:
            return
    raise Failed(f"nothing was started ahead for {job_id}")


def _processor_s(job_id: str) -> float:
    """Rounded to a tenth: its threads look up now and then."""
    total = 0.0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK_VARIABLE, "").startswith(f"{job_id}/"):
                spent = process.cpu_times()
                total += spent.user + spent.system
        except psutil.Error:
            continue
    return round(total, 1)


def one_start(heliostat: Heliostat, body: dict[str, Any], way: str) -> Run:
    """Raises Failed. `ahead`: behind a job that is cancelled once this one's process has imported."""
    if way == "ahead":
        before = Watched(heliostat, body)
        before.first_step()
        job = Watched(heliostat, body)
        wait_for_imports(job.id)
        before.cancel()
    else:
        job = Watched(heliostat, body)
    run = job.first_step()
    job.end()
    return run


def measure(services: dict[str, Heliostat], options: argparse.Namespace) -> dict[str, Any]:
    intents = sorted(json.loads((options.data / "categories.json").read_text()))[:10]
    rows = read_rows(options.data / "train.csv", intents)
    names = {id(one): upload(one, "rows", rows) for one in services.values()}
    runs: dict[str, list[Run]] = {way: [] for way in services}
    for number in range(options.repeats + 1):
        for way, heliostat in services.items():
            body = {"base_model": BASE_MODEL, "dataset_id": names[id(heliostat)], "hyperparams": HYPERPARAMS}
            run = one_start(heliostat, body, way)
            if number > 0:  # the first one of each makes environment and model
                runs[way].append(run)
            print(f"{number}/{options.repeats} {way}: {run.first_step_s:.1f} s {run.stages}", flush=True)
    return {
        "hardware": hardware(),
        "repeats": options.repeats,
        "ways": {way: [vars(run) for run in some] for way, some in runs.items()},
    }


def median(runs: list[dict[str, Any]]) -> float:
    return float(statistics.median(run["first_step_s"] for run in runs))


def as_markdown(result: dict[str, Any]) -> str:
    machine, ways = result["hardware"], result["ways"]
    slowest = median(ways["worker"])
    lines = [
        "# From the grant to the first step",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, load {machine['load']}, commit "
        f"{machine['commit']}; {result['repeats']} alternating repeats, medians. SmolLM2-135M, LoRA r=16, batch 8 of banking77.",
        "",
        "| the training process | grant to first step, s | ratio | each |",
        "|---|---|---|---|",
    ]
    for way, runs in ways.items():
        each = ", ".join(f"{run['first_step_s']:.1f}" for run in runs)
        lines.append(f"| {WAYS[way]} | {median(runs):.1f} | {median(runs) / slowest:.2f} | {each} |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "banking77")
    parser.add_argument("--model", default=None, help="SmolLM2-135M as a folder; else the package's file is converted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def opened(folder: Path, early: bool, model: str) -> Heliostat:
    """Raises Failed."""
    one = {"HELIOSTAT_NODE__KIND": "cpu", "HELIOSTAT_NODE__SLOTS": "1", "HELIOSTAT_TRAINING__START_EARLY": str(early)}
    heliostat = Heliostat(folder, one)
    heliostat.start()
    heliostat.cli("base-model", "add", BASE_MODEL, model)
    return heliostat


def main(options: argparse.Namespace) -> int:
    if not options.data.is_dir():
        print(f"{options.data} is not there; name the banking77 folder with --data", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="hs-"))
    running: list[Heliostat] = []
    try:
        model = options.model or str(find_gguf())
        for early in (False, True):
            running.append(opened(folder / f"{early:d}", early, model))
        late, soon = running
        result = measure({"worker": late, "grant": soon, "ahead": soon}, options)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for heliostat in running:
            heliostat.stop()
        shutil.rmtree(folder, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "start.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "start.md").write_text(as_markdown(result))
    print(f"\n{as_markdown(result)}\n{options.out}/start.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
