"""Ten intents of banking77 on SmolLM2-135M through a whole Heliostat: exact match for three seeds, tokens a second, and the
seconds from POST to the first optimizer step, cold and warm, with where they go.

Against a running service: HELIOSTAT_URL and HELIOSTAT_TOKEN or HELIOSTAT_TOKEN_FILE. With --up: one of its own."""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import hardware  # noqa: E402
from examples.local_heliostat import Failed, Heliostat, find_gguf, steps_of  # noqa: E402

BASE_MODEL = "smollm2-135m"
HYPERPARAMS: dict[str, Any] = {"lr": 1e-3, "batch_size": 8, "lora_r": 16}
TEST_ROWS = 400
SHUFFLE_SEED = 0


@dataclass
class Run:
    """One job. `first_step_s`: from before the POST until the first optimizer step is told of. `stages` in seconds."""

    job_id: str = ""
    seed: int = 0
    first_step_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)
    exact_match: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    train_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.train_s if self.train_s else 0.0

    def absorb(self, event: dict[str, Any], since_post_s: float) -> None:
        data = event.get("data") or {}
        if event["type"] == "stage":
            self.stages[data["stage"]] = data["seconds"]
        elif event["type"] == "evaluated":
            self.exact_match[data["when"]] = data["exact_match"]
            self.loss[data["when"]] = data["loss"]
        for step in steps_of(event):
            self.first_step_s = self.first_step_s or since_post_s
            self.steps, self.tokens = step["step"], self.tokens + step["tokens"]
            self.train_s += step["seconds"]


def read_rows(file: Path, intents: list[str]) -> list[dict[str, Any]]:
    """One chat a question, the intent as the answer."""
    system = "Name the intent of the message of a bank customer."
    with file.open(newline="", encoding="utf-8") as source:
        asked = [(row["text"], row["category"]) for row in csv.DictReader(source) if row["category"] in intents]
    random.Random(SHUFFLE_SEED).shuffle(asked)
    return [{"messages": _messages(system, text, intent)} for text, intent in asked]


def _messages(system: str, text: str, intent: str) -> list[dict[str, str]]:
    roles = (("system", system), ("user", text), ("assistant", intent))
    return [{"role": role, "content": content} for role, content in roles]


def upload(heliostat: Heliostat, name: str, rows: list[dict[str, Any]]) -> str:
    """The reference of the new version. Raises Failed."""
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    answer = heliostat.http.post("/datasets", data={"name": name}, files={"file": (f"{name}.jsonl", content)})
    if answer.is_error:
        raise Failed(f"uploading {name} was answered with {answer.status_code}: {answer.text}")
    return str(answer.json()["ref"])


def train(heliostat: Heliostat, body: dict[str, Any]) -> Run:
    """Raises Failed."""
    run = Run(seed=body["hyperparams"]["seed"])
    began = time.monotonic()
    run.job_id = heliostat.post("/finetune", body)["id"]
    for event in heliostat.events(run.job_id):
        run.absorb(event, time.monotonic() - began)
    run.total_s = time.monotonic() - began
    job = heliostat.get(f"/finetune/{run.job_id}")
    if job["status"] != "succeeded":
        raise Failed(f"{run.job_id} has {job['status']}: {job.get('error')}")
    print(f"  {run.job_id} seed {run.seed}: first step {run.first_step_s:.1f} s, {run.exact_match}", flush=True)
    return run


def measure(heliostat: Heliostat, options: argparse.Namespace) -> dict[str, Any]:
    intents = json.loads((options.data / "categories.json").read_text())
    intents = sorted(intents)[: options.intents]
    training = upload(heliostat, "banking77-train", read_rows(options.data / "train.csv", intents))
    test = upload(heliostat, "banking77-test", read_rows(options.data / "test.csv", intents))
    body = {"base_model": options.base_model, "dataset_id": training, "output_model": "banking77"}
    short = {**body, "hyperparams": {**HYPERPARAMS, "max_steps": 2, "seed": 0}}
    print("Starts (without validation, two steps)", flush=True)
    starts = {kind: train(heliostat, short) for kind in (("cold", "warm") if options.up else ("warm",))}
    print(f"Training, {options.steps} steps of {HYPERPARAMS['batch_size']}", flush=True)
    long = {**HYPERPARAMS, "max_steps": options.steps}
    evaluated = {**body, "validation_dataset_id": test}
    runs = [train(heliostat, {**evaluated, "hyperparams": {**long, "seed": seed}}) for seed in range(options.seeds)]
    return {
        "intents": intents,
        "hyperparams": long,
        "hardware": hardware(),
        "starts": {kind: asdict(run) for kind, run in starts.items()},
        "runs": [{**asdict(run), "tokens_per_s": run.tokens_per_s} for run in runs],
    }


def as_markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    asked = result["hyperparams"]
    lines = [
        f"# banking77, {len(result['intents'])} intents, {asked['max_steps']} steps of {asked['batch_size']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, GPUs: {', '.join(machine['gpus']) or 'none'}, "
        f"load {machine['load']}, commit {machine['commit']}",
        "",
        "| seed | exact match before | after | tokens/s | seconds in all |",
        "|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        before, after = run["exact_match"]["before"], run["exact_match"]["after"]
        lines.append(
            f"| {run['seed']} | {before:.1%} | {after:.1%} | {run['tokens_per_s']:.0f} | {run['total_s']:.0f} |"
        )
    return "\n".join([*lines, "", *_starts_table(result["starts"])]) + "\n"


def _starts_table(starts: dict[str, Any]) -> list[str]:
    """Seconds from POST to the first optimizer step; what no stage accounts for is waiting and telling."""
    stages = list(dict.fromkeys(stage for run in starts.values() for stage in run["stages"]))
    rows = []
    for kind, run in starts.items():
        rest = run["first_step_s"] - sum(run["stages"].values())
        cells = [*(f"{run['stages'].get(stage, 0.0):.1f}" for stage in stages), f"{rest:.1f}"]
        rows.append(f"| {kind} | {run['first_step_s']:.1f} | {' | '.join(cells)} |")
    titles = [stage.replace("_", " ") for stage in stages]
    head = f"| start | POST to first step, s | {' | '.join([*titles, 'rest'])} |"
    return [head, "|---" * (len(stages) + 3) + "|", *rows]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--up", action="store_true", help="start a Heliostat on a folder of its own, stop it at the end"
    )
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "banking77")
    parser.add_argument("--base-model", default=BASE_MODEL)
    parser.add_argument("--intents", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def token() -> str:
    """Raises Failed."""
    if file := os.environ.get("HELIOSTAT_TOKEN_FILE"):
        return Path(file).read_text().strip()
    if given := os.environ.get("HELIOSTAT_TOKEN"):
        return given
    raise Failed("set HELIOSTAT_TOKEN or HELIOSTAT_TOKEN_FILE, or start a service with --up")


def write(result: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "banking77.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "banking77.md").write_text(as_markdown(result))
    print(f"\n{as_markdown(result)}\n{folder}/banking77.json")


def main(options: argparse.Namespace) -> int:
    if not options.data.is_dir():
        print(f"{options.data} is not there; name the banking77 folder with --data", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="heliostat-bench-"))
    heliostat = Heliostat(folder, {"HELIOSTAT_TRAINING__EXACT_MATCH_ROWS": str(TEST_ROWS)})
    try:
        if options.up:
            heliostat.start()
            heliostat.cli("base-model", "add", options.base_model, str(find_gguf()))
        else:
            heliostat.connect(os.environ.get("HELIOSTAT_URL", "http://127.0.0.1:8000"), token())
        write(measure(heliostat, options), options.out)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if options.up:
            heliostat.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
