"""`make demo`: starts a Heliostat of its own, fine-tunes a real model on real rows over HTTP, shows before and after, stops.

KEEP=1 leaves it running. Exit code 0 only if the model could not do the task before and can afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from local_heliostat import COMMAND, Failed, Heliostat, find_gguf, steps_of

HERE = Path(__file__).parent
BASE_MODEL = "smollm2-135m"
REQUEST: dict[str, Any] = {
    "base_model": BASE_MODEL,
    "dataset_id": "support-train",
    "validation_dataset_id": "support-validation",
    "hyperparams": {"lr": 1e-3, "batch_size": 8, "max_steps": 36, "lora_r": 16},
    "output_model": "support-router",
}
MOST_BEFORE, LEAST_AFTER = 0.10, 0.60


class Phases:
    """Prints each phase's name and, at its end, its seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        began = time.monotonic()
        print(f"\n▸ {title}", flush=True)
        yield
        print(f"  ({time.monotonic() - began:.1f} s)", flush=True)

    @property
    def total_s(self) -> float:
        return time.monotonic() - self._began


class Watch:
    """Draws a job's events: one line that is drawn anew on a terminal, a line every ten steps elsewhere."""

    def __init__(self) -> None:
        self.evaluated: dict[str, dict[str, Any]] = {}
        self._steps: int | None = None
        self._live = sys.stdout.isatty()

    def absorb(self, event: dict[str, Any]) -> None:
        data = event.get("data") or {}
        if event["type"] == "metrics":
            for step in steps_of(event):
                self._draw(step)
        elif event["type"] == "evaluated":
            self.evaluated[data["when"]] = data
            self._line(f"{event['message']}: {data['exact_match']:.1%} answered exactly, loss {data['loss']:.3f}")
        else:
            self._steps = data.get("steps", self._steps)
            self._line(f"{event['type']:<10} {event['message']}")

    def _draw(self, step: dict[str, Any]) -> None:
        of = self._steps or step["step"]
        bar = "█" * (30 * step["step"] // of)
        numbers = f"loss {step['loss']:.3f}  {step['seconds']:.1f} s/step"
        line = f"  [{bar:·<30}] step {step['step']}/{of}  {numbers}"
        if self._live:
            print(f"\r{line}\033[K", end="\n" if step["step"] == of else "", flush=True)
        elif step["step"] == 1 or step["step"] % 10 == 0 or step["step"] == of:
            print(line, flush=True)

    def _line(self, text: str) -> None:
        print(f"\r\033[K  {text}" if self._live else f"  {text}", flush=True)


def prepare(heliostat: Heliostat) -> None:
    model = heliostat.cli("base-model", "add", BASE_MODEL, str(find_gguf()))
    print(f"  {BASE_MODEL}: {model['parameters'] / 1e6:.1f} million parameters")
    for split in ("train", "validation"):
        made = heliostat.cli(
            "dataset", "upload", str(HERE / "support" / f"{split}.jsonl"), "--name", f"support-{split}"
        )
        print(f"  {made['ref']}: {made['rows']} rows, format {made['format']}")


def train(heliostat: Heliostat) -> tuple[dict[str, Any], Watch]:
    """The job as it ended. Raises Failed."""
    print(f"  POST {heliostat.url}/api/v1/finetune\n{_indented(REQUEST)}")
    job = heliostat.post("/finetune", REQUEST)
    shown = ("id", "status", "model", "method", "training_type", "hyperparams", "resource_config", "output_model")
    print(f"  202\n{_indented({name: job.get(name) for name in shown})}", flush=True)
    watch = Watch()
    for event in heliostat.events(job["id"]):
        watch.absorb(event)
    job = heliostat.get(f"/finetune/{job['id']}")
    if job["status"] != "succeeded":
        error = job.get("error") or {}
        raise Failed(f"the job has {job['status']}: {error.get('message')} {error.get('hint') or ''}")
    if not {"before", "after"} <= watch.evaluated.keys():
        raise Failed(f"the job evaluated only {sorted(watch.evaluated)}, not before and after")
    return job, watch


def _indented(value: dict[str, Any]) -> str:
    return "\n".join("    " + line for line in json.dumps(value, indent=2).splitlines())


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    print(
        f"  answered exactly: {before['exact_match']:.1%} before, {after['exact_match']:.1%} after ({after['rows']} rows)"
    )
    for old, new in zip(before["samples"], after["samples"], strict=True):
        print(f"\n  customer  {question(old['prompt'])}\n  expected  {old['expected']}")
        print(f"  base      {_short(old['answer'])}\n  tuned     {_short(new['answer'])}")


def question(prompt: str) -> str:
    """What the customer wrote, out of the rendered prompt (ChatML)."""
    return prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0].strip()


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 90 else f"{flat[:89]}…"


def download(heliostat: Heliostat, model: str, folder: Path) -> Path:
    """The folder with the adapter's files. Raises Failed when what arrives is not what the service says it sent."""
    archive = folder / "model.tar"
    digest = hashlib.sha256()
    with heliostat.http.stream("GET", f"/models/{model}/download") as answer, archive.open("wb") as sink:
        answer.raise_for_status()
        for chunk in answer.iter_bytes():
            sink.write(chunk)
            digest.update(chunk)
        told = answer.headers["x-content-sha256"]
    if digest.hexdigest() != told:
        raise Failed(f"the archive arrived with sha256 {digest.hexdigest()}, the service told {told}")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    found = next(folder.rglob("adapter_model.safetensors")).parent
    print(f"  {model}: {archive.stat().st_size / 1e6:.1f} MB, sha256 {told[:16]}… is right\n  {found}")
    return found


def ask_outside(adapter: Path, sample: dict[str, str]) -> None:
    """One question to the adapter in a process that knows nothing of Heliostat. Raises Failed."""
    row = json.loads((HERE / "support" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0])
    script = [sys.executable, str(HERE / "load_adapter.py"), str(adapter), str(find_gguf())]
    asked = [question(sample["prompt"]), row["messages"][0]["content"]]
    done = subprocess.run([*script, *asked], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the adapter cannot be loaded by transformers and peft alone:\n{done.stderr[-2000:]}")
    print(f"  customer  {asked[0]}\n  answer    {done.stdout.strip()}  (the job's own: {sample['answer']})")


def run(heliostat: Heliostat, phases: Phases) -> bool:
    """Whether the training did what it should."""
    with phases.phase("heliostat up"):
        heliostat.start()
        print(f"  {heliostat.url}   (API: {heliostat.url}/docs, Ray: {heliostat.dashboard_url})")
    with phases.phase("Base model and datasets"):
        prepare(heliostat)
    with phases.phase("Fine-tuning"):
        job, watch = train(heliostat)
    before, after = watch.evaluated["before"], watch.evaluated["after"]
    with phases.phase("Before and after"):
        compare(before, after)
    with phases.phase("The artifact, downloaded"):
        folder = heliostat.data_dir / "downloads"
        folder.mkdir()
        adapter = download(heliostat, job["fine_tuned_model"], folder)
    with phases.phase("The artifact in plain transformers and peft"):
        ask_outside(adapter, after["samples"][0])
    learned = bool(before["exact_match"] < MOST_BEFORE and after["exact_match"] > LEAST_AFTER)
    if not learned:
        print(
            f"\nThe aim is less than {MOST_BEFORE:.0%} answered exactly before and more than {LEAST_AFTER:.0%} after."
        )
    return learned


def stop(heliostat: Heliostat, phases: Phases) -> bool:
    """Whether nothing is left of it."""
    with phases.phase("heliostat down"):
        heliostat.stop()
        left = heliostat.leftovers()
        print("  no process is left" if not left else "  still there:\n    " + "\n    ".join(left))
    shutil.rmtree(heliostat.data_dir, ignore_errors=True)
    return not left


def say_kept(heliostat: Heliostat) -> None:
    """How to go on with what KEEP=1 left running."""
    folder = heliostat.data_dir
    print(f"\nIt goes on: {heliostat.url}/docs, Ray dashboard {heliostat.dashboard_url}")
    print(f"  token   {folder}/keys/default.token")
    print(
        f"  use it  HELIOSTAT_URL={heliostat.url} HELIOSTAT_TOKEN_FILE={folder}/keys/default.token {COMMAND} models ls"
    )
    print(f"  stop it {COMMAND} down --data-dir {folder} --purge --yes")


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    keep = os.environ.get("KEEP") == "1"
    heliostat, phases = Heliostat(Path(tempfile.mkdtemp(prefix="heliostat-demo-"))), Phases()
    code, clean = 1, True
    try:
        code = 0 if run(heliostat, phases) else 1
    except Failed as error:
        print(f"\nThe demo failed: {error}\nLogs: {heliostat.data_dir}/logs (KEEP=1 keeps them)", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print("\ninterrupted, cleaning up")
    finally:
        if keep and code != 130:
            say_kept(heliostat)
        else:
            clean = stop(heliostat, phases)
    ending = {0: "Done", 130: "Interrupted"}.get(code, "Not as it should be")
    print(f"\n{ending} after {phases.total_s:.0f} s.")
    return code or int(not clean)


if __name__ == "__main__":
    sys.exit(main())
