"""Training speed against TRL's SFTTrainer on SmolLM2-135M: rows a second, peak memory above the imports, seconds from the
process's start to the first step; and whether both learn the same. Same rows in the same order, LoRA, precision, batch, threads;
the two sides alternate, each in a fresh process; medians."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.banking77 import read_rows  # noqa: E402
from benchmarks.hardware import hardware  # noqa: E402
from examples.local_heliostat import find_gguf  # noqa: E402
from trainers.child.launcher import ENVIRONMENT  # noqa: E402
from trainers.config import Hyperparams, TrainConfig  # noqa: E402

BATCH_SIZE = 8
WAITING = {name: ENVIRONMENT[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
"""How threads wait, as our launcher has it; TRL gains by it too."""
LORA_R = 16
LR = 1e-3
INTENTS = 10
STEPS = {"banking77": 8, "gsm8k": 4}
EXACT_STEPS = 8


@dataclass(frozen=True)
class Used:
    """By a process: KiB resident now and at most, seconds of processor."""

    resident: int
    peak: int
    cpu_s: float


@dataclass
class Run:
    """One process. `seconds` of each step by the clock; `cpu_s` the process's when each step ended; memory in KiB."""

    began: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    first_step_s: float = 0.0
    imports_s: float = 0.0
    after_imports: int = 0
    peak: int = 0

    def absorb(self, message: dict[str, Any], used: Used) -> None:
        if message["type"] == "hello":
            self.imports_s, self.after_imports = time.monotonic() - self.began, used.resident
        elif message["type"] == "step":
            self.cpu_s.append(used.cpu_s)
            self.first_step_s = self.first_step_s or time.monotonic() - self.began
            self.losses.append(message["loss"])
            self.seconds.append(message["seconds"])
            self.peak = used.peak

    @property
    def step_s(self) -> float:
        """The first step warms up."""
        return statistics.median(self.seconds[1:])

    @property
    def step_cpu_s(self) -> float:
        """What a step costs whatever else the machine does."""
        return statistics.median(after - before for before, after in pairwise(self.cpu_s))

    @property
    def peak_mib(self) -> float:
        return (self.peak - self.after_imports) / 1024


@dataclass(frozen=True)
class Bench:
    """`folder`: of this run alone. `trl`: the folder that TRL is installed in."""

    folder: Path
    model: Path
    trl: Path
    threads: int

    def config(self, rows: Path, name: str, **fields: Any) -> TrainConfig:
        known = set(Hyperparams.__dataclass_fields__)
        hyper: dict[str, Any] = {
            "batch_size": BATCH_SIZE,
            "lr": LR,
            "lora_r": LORA_R,
            "lora_alpha": 2 * LORA_R,
            "seed": 0,
        }
        hyper |= {"lr_scheduler": "constant", "warmup_ratio": 0.0}
        hyper |= {key: fields.pop(key) for key in list(fields) if key in known}
        return TrainConfig(
            base_model=str(self.model),
            train_file=str(rows),
            output_dir=str(self.folder / name),
            hyperparams=Hyperparams(**hyper),
            threads_per_slot=self.threads,
            checkpoint_every_s=1e9,
            exact_match_rows=fields.pop("exact_match_rows", 0),
            **fields,
        )

    def ours(self, config: TrainConfig) -> Run:
        place = self.folder / "config.json"
        place.write_text(json.dumps(config.to_dict()))
        run = Run(time.monotonic())
        launcher = 0
        for message in self._lines([sys.executable, "-m", "trainers.child.main", str(place)]):
            launcher = message.get("pid", launcher)
            if message["type"] == "hello":
                run.absorb(message, _used(launcher))
            elif message["type"] == "step":
                run.absorb(message, max((_used(pid) for pid in _children(launcher)), key=lambda used: used.resident))
        return run

    def evaluated(self, config: TrainConfig) -> dict[str, float]:
        """The last `evaluated` message's figures."""
        place = self.folder / "config.json"
        place.write_text(json.dumps(config.to_dict()))
        messages = list(self._lines([sys.executable, "-m", "trainers.child.main", str(place)]))
        last = [message for message in messages if message["type"] == "evaluated"][-1]
        return {key: last[key] for key in ("loss", "exact_match")}

    def theirs(self, config: TrainConfig, rows: list[dict[str, Any]]) -> Run:
        hyper = config.hyperparams
        task = {
            "model": config.base_model, "out": config.output_dir, "adapter": config.adapter, "rows": rows,
            "steps": hyper.max_steps, "batch_size": hyper.batch_size, "lr": hyper.lr, "lora_r": hyper.lora_r,
            "precision": config.precision, "threads": self.threads,
        }  # fmt: skip
        place = self.folder / "task.json"
        place.write_text(json.dumps(task))
        run = Run(time.monotonic())
        for message in self._lines([sys.executable, str(ROOT / "benchmarks" / "trl_sft.py"), str(place)]):
            run.absorb(message, Used(message["resident"], message["peak"], message["cpu_s"]))
        return run

    def _lines(self, command: list[str]) -> Iterator[dict[str, Any]]:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{self.trl}",
            "OMP_NUM_THREADS": str(self.threads),
            **WAITING,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with (self.folder / "stderr.txt").open("w") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('{"type": "failed"'):
                    sys.exit(line + (self.folder / "stderr.txt").read_text()[-3000:])
                if line.startswith('{"type"'):
                    yield json.loads(line)
        if process.wait():
            sys.exit((self.folder / "stderr.txt").read_text()[-3000:])


def _children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _used(pid: int) -> Used:
    process = psutil.Process(pid)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    spent = process.cpu_times()
    return Used(process.memory_info().rss // 1024, peak, spent.user + spent.system)


def chats(name: str, data: Path) -> list[dict[str, Any]]:
    """banking77: ten intents, a system prompt and a short answer; gsm8k: the question, the whole solution."""
    if name == "banking77":
        intents = sorted(json.loads((data / name / "categories.json").read_text()))[:INTENTS]
        return read_rows(data / name / "train.csv", intents)
    rows = [json.loads(line) for line in (data / name / "train.jsonl").read_text().splitlines()[:1000]]
    turns = (("user", "question"), ("assistant", "answer"))
    return [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in rows]


def tokens_in_order(config: TrainConfig) -> list[dict[str, Any]]:
    """The rows of all steps as our plan has them, as TRL takes tokens."""
    from transformers import AutoTokenizer

    from trainers.child import data, rows

    tokenizer = AutoTokenizer.from_pretrained(config.base_model)
    encoded = data.encode(rows.read_data(config)[0], tokenizer, config.hyperparams, None)
    plan = data.Plan(len(encoded.examples), config.hyperparams)
    order = [row for step in range(1, plan.steps + 1) for row in plan.batch(step)]
    return [{"input_ids": encoded.examples[row].ids, "labels": encoded.examples[row].labels} for row in order]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def speed(bench: Bench, name: str, rows: Path, repeats: int) -> dict[str, Any]:
    """Alternating runs in bfloat16."""
    config = bench.config(rows, name, max_steps=STEPS[name], precision="bf16")
    tokens = tokens_in_order(config)
    runs: dict[str, list[Run]] = {"trl": [], "heliostat": []}
    for number in range(repeats):
        runs["trl"].append(bench.theirs(config, tokens))
        runs["heliostat"].append(bench.ours(config))
        steps = {side: (round(some[-1].step_s, 2), round(some[-1].step_cpu_s, 2)) for side, some in runs.items()}
        print(f"{name} {number + 1}/{repeats}: seconds a step, of processor {steps}", flush=True)
    per_step = statistics.mean(len(row["input_ids"]) for row in tokens) * BATCH_SIZE
    return {"tokens_per_row": per_step / BATCH_SIZE} | {side: _medians(some, per_step) for side, some in runs.items()}


def _medians(runs: list[Run], tokens_per_step: float) -> dict[str, Any]:
    step_s = statistics.median(run.step_s for run in runs)
    return {
        "step_s": [run.step_s for run in runs],
        "step_cpu_s": statistics.median(run.step_cpu_s for run in runs),
        "rows_per_s": BATCH_SIZE / step_s,
        "tokens_per_s": tokens_per_step / step_s,
        "first_step_s": statistics.median(run.first_step_s for run in runs),
        "imports_s": statistics.median(run.imports_s for run in runs),
        "peak_mib": statistics.median(run.peak_mib for run in runs),
        "losses": runs[-1].losses,
    }


def exactness(bench: Bench, rows: Path) -> dict[str, Any]:
    """The losses of both in float32 from the same adapter, ours with packing off; the largest relative difference."""
    start = bench.config(rows, "start", max_steps=1, precision="fp32", packing=False)
    bench.ours(start)
    adapter = str(Path(start.output_dir) / "artifact")
    config = bench.config(
        rows, "exact", max_steps=EXACT_STEPS, precision="fp32", packing=False, adapter=adapter, seed=1
    )
    ours, theirs = bench.ours(config).losses, bench.theirs(config, tokens_in_order(config)).losses
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    return {"heliostat": ours, "trl": theirs, "worst": worst}


def quality(bench: Bench, rows: Path, steps: int) -> dict[str, Any]:
    """Loss and exact match on rows that were not trained on, with packing and without."""
    chosen = bench.folder / "held-out.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    chosen.write_text("".join(lines[-200:]))
    train = bench.folder / "train.jsonl"
    train.write_text("".join(lines[:-200]))
    found = {}
    for packing in (True, False):
        config = bench.config(
            train, f"quality-{packing}", max_steps=steps, precision="bf16", packing=packing,
            validation_file=str(chosen), exact_match_rows=200,
        )  # fmt: skip
        found["packed" if packing else "unpacked"] = bench.evaluated(config)
    return found


def as_markdown(result: dict[str, Any]) -> str:
    machine = result["hardware"]
    lines = [
        "# Training speed against TRL's SFTTrainer",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, load {machine['load']}, commit "
        f"{machine['commit']}; TRL {result['trl']}; {result['threads']} threads, {result['repeats']} alternating repeats. "
        f"SmolLM2-135M, LoRA r={LORA_R} on all linear layers, batch {BATCH_SIZE}, bfloat16.",
        "TRL gets its rows as tokens, and its default recomputation of activations is off; both sides have "
        f"{' '.join(f'{name}={value}' for name, value in WAITING.items())}. "
        "Processor seconds compare the sides also where the machine was not idle.",
        "",
        "| rows | tokens/row | side | rows/s | tokens/s | processor s/step | peak above imports, MiB | start to first step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, case in result["speed"].items():
        for side in ("trl", "heliostat"):
            one = case[side]
            lines.append(
                f"| {name} | {case['tokens_per_row']:.0f} | {side} | {one['rows_per_s']:.2f} | {one['tokens_per_s']:.0f} "
                f"| {one['step_cpu_s']:.2f} | {one['peak_mib']:.0f} | {one['first_step_s']:.1f} |"
            )
        keys = ("rows_per_s", "step_cpu_s", "peak_mib", "first_step_s")
        speed, *others = (case["heliostat"][key] / case["trl"][key] for key in keys)
        cells = " | ".join(f"{one:.2f}" for one in others)
        lines.append(f"| {name} | | ratio | **{speed:.2f}** | | {cells} |")
    return "\n".join([*lines, "", *_checks(result)]) + "\n"


def _checks(result: dict[str, Any]) -> list[str]:
    lines = []
    if exact := result.get("exactness"):
        lines.append(
            f"Same adapter, rows and order in float32, packing off: over {len(exact['trl'])} steps the losses differ from TRL's "
            f"by at most {exact['worst']:.0e} of themselves."
        )
    if found := result.get("quality"):
        lines += ["", "| banking77, held out | loss | exact match |", "|---|---|---|"]
        lines += [f"| {name} | {one['loss']:.4f} | {one['exact_match']:.1%} |" for name, one in found.items()]
    return lines


def find_model(given: Path | None, folder: Path) -> Path:
    """SmolLM2 as a folder; made from the package's file where none is given (half a minute)."""
    if given is not None:
        return given
    subprocess.run(
        [sys.executable, "-m", "trainers.child.convert", str(find_gguf()), str(folder / "smollm2")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return folder / "smollm2"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument(
        "--trl", type=Path, required=True, help="folder with trl and datasets (`make bench-train` fills one)"
    )
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a Hugging Face folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--checks", nargs="*", default=["exactness", "quality"], choices=["exactness", "quality"])
    parser.add_argument("--quality-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(folder, find_model(options.model, folder), options.trl.resolve(), options.threads)
    rows = {name: write_rows(folder / f"{name}.jsonl", chats(name, options.data)) for name in STEPS}
    [version] = [one.name.split("-")[1].removesuffix(".dist") for one in options.trl.glob("trl-*.dist-info")]
    result: dict[str, Any] = {
        "hardware": hardware(), "trl": version, "threads": options.threads, "repeats": options.repeats,
        "speed": {name: speed(bench, name, rows[name], options.repeats) for name in options.cases},
    }  # fmt: skip
    if "exactness" in options.checks:
        result["exactness"] = exactness(bench, rows["banking77"])
    if "quality" in options.checks:
        result["quality"] = quality(bench, rows["banking77"], options.quality_steps)
    return result


def main(options: argparse.Namespace) -> int:
    if not options.data.is_dir():
        print(f"{options.data} is not there; name the folder with banking77 and gsm8k with --data", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="heliostat-bench-") as folder:
        result = measure(options, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "train.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "train.md").write_text(as_markdown(result))
    print(f"\n{as_markdown(result)}\n{options.out}/train.json")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
