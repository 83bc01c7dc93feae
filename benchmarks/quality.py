"""Do jobs learn? Through a whole Heliostat of its own, on validation rows, before and after: twenty intents of banking77 (exact
match), gsm8k (loss), and a small encoder with random weights that learns to classify (accuracy)."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.banking77 import BASE_MODEL, read_rows, upload  # noqa: E402
from benchmarks.hardware import hardware  # noqa: E402
from examples.local_heliostat import Failed, Heliostat, find_gguf, steps_of  # noqa: E402

INTENTS = 20
TEST_ROWS = 400
GSM8K_TEST_ROWS = 50
ENCODER = "small-encoder"
LORA = {"lr": 1e-3, "batch_size": 8, "lora_r": 16, "seed": 0}
Rows = list[dict[str, Any]]
Runs = dict[str, dict[str, Any]]
"""By case."""


def banking77(data: Path) -> tuple[Rows, Rows]:
    train, test = (read_rows(data / "banking77" / f"{part}.csv", _intents(data)) for part in ("train", "test"))
    return train, test[:TEST_ROWS]


def classes(data: Path) -> tuple[Rows, Rows]:
    """The same questions and intents, to be classified."""
    train, test = banking77(data)
    return [_labelled(row) for row in train], [_labelled(row) for row in test]


def _intents(data: Path) -> list[str]:
    return sorted(json.loads((data / "banking77" / "categories.json").read_text()))[:INTENTS]


def _labelled(row: dict[str, Any]) -> dict[str, str]:
    _, asked, answer = row["messages"]
    return {"text": asked["content"], "label": answer["content"]}


def gsm8k(data: Path) -> tuple[Rows, Rows]:
    train, test = (_problems(data / "gsm8k" / f"{part}.jsonl") for part in ("train", "test"))
    return train, test[:GSM8K_TEST_ROWS]


def _problems(file: Path) -> Rows:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    turns = (("user", "question"), ("assistant", "answer"))
    return [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in rows]


def make_encoder(folder: Path, rows: Rows) -> Path:
    """BERT's architecture in small, its vocabulary from the rows, its weights random: all that it will know it learns in the
    job."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    words = BertWordPieceTokenizer()
    words.train_from_iterator([row["text"] for row in rows], vocab_size=4000, show_progress=False)
    folder.mkdir(parents=True)
    words.save_model(str(folder))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words.get_vocab_size(), hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def train(heliostat: Heliostat, body: dict[str, Any]) -> dict[str, Any]:
    """Raises Failed."""
    began, found = time.monotonic(), {"steps": 0, "train_s": 0.0, "before": {}, "after": {}}
    job = heliostat.post("/finetune", body)["id"]
    for event in heliostat.events(job):
        data = event.get("data") or {}
        if event["type"] == "evaluated":
            found[data["when"]] = {key: data[key] for key in ("loss", "exact_match", "accuracy", "rows") if key in data}
        for step in steps_of(event):
            found |= {"steps": step["step"], "train_s": found["train_s"] + step["seconds"]}
    found["total_s"] = time.monotonic() - began
    ended = heliostat.get(f"/finetune/{job}")
    if ended["status"] != "succeeded":
        raise Failed(f"{job} has {ended['status']}: {ended.get('error')}")
    return {**found, "hyperparams": ended["hyperparams"], "hardware": hardware()}


Case = tuple[Callable[[Path], tuple[Rows, Rows]], dict[str, Any]]


def cases(steps: int) -> dict[str, Case]:
    classify = {"task": "sequence_classification", "training_type": "full", "base_model": ENCODER}
    hyper = {"lr": 5e-4, "batch_size": 32, "epochs": 12, "seed": 0}
    return {
        "banking77, 20 intents": (banking77, {"base_model": BASE_MODEL, "hyperparams": {**LORA, "max_steps": steps}}),
        "gsm8k": (gsm8k, {"base_model": BASE_MODEL, "hyperparams": {**LORA, "lr": 5e-4, "max_steps": steps // 4}}),
        "encoder, 20 intents": (classes, {**classify, "hyperparams": hyper}),
    }


def measure(heliostat: Heliostat, options: argparse.Namespace, done: Runs) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, (name, (read, body)) in enumerate(cases(options.steps).items()):
        if name in done:
            continue
        training, test = read(options.data)
        if body["base_model"] == ENCODER:
            heliostat.cli("base-model", "add", ENCODER, str(make_encoder(heliostat.data_dir / "made", training)))
        refs = upload(heliostat, f"train-{number}", training), upload(heliostat, f"test-{number}", test)
        found = train(heliostat, {**body, "dataset_id": refs[0], "validation_dataset_id": refs[1]})
        print(f"{name}: {found['before']} → {found['after']}, {found['total_s']:.0f} s", flush=True)
        yield name, found


def as_markdown(runs: Runs) -> str:
    machine = next(iter(runs.values()))["hardware"]
    lines = [
        "# What jobs learn",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB. SmolLM2-135M with LoRA; the encoder (4 layers, "
        "256 wide, random weights) in full. On rows that are not trained on.",
        "",
        "| rows | steps of | loss before | after | exact match or accuracy before | after | seconds in all | commit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        before, after = run["before"], run["after"]
        lines.append(
            f"| {name} | {run['steps']} of {run['hyperparams']['batch_size']} | {before['loss']:.3f} | {after['loss']:.3f} "
            f"| {_right(before)} | {_right(after)} | {run['total_s']:.0f} | {run['hardware']['commit']} |"
        )
    return "\n".join(lines) + "\n"


def _right(found: dict[str, Any]) -> str:
    share = found.get("accuracy", found.get("exact_match"))
    return "–" if share is None else f"{share:.1%}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--steps", type=int, default=160, help="of the first case; a quarter of it for gsm8k")
    parser.add_argument("--resume", action="store_true", help="go on after the last case that was finished")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> int:
    if not options.data.is_dir():
        print(f"{options.data} is not there; name the folder with banking77 and gsm8k with --data", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "quality.json"
    runs: Runs = json.loads(file.read_text()) if options.resume and file.is_file() else {}
    folder = Path(tempfile.mkdtemp(prefix="heliostat-bench-"))
    one_slot = {"HELIOSTAT_NODE__KIND": "cpu", "HELIOSTAT_NODE__SLOTS": "1"}  # with all cores
    heliostat = Heliostat(folder, {**one_slot, "HELIOSTAT_TRAINING__EXACT_MATCH_ROWS": str(TEST_ROWS)})
    try:
        heliostat.start()
        heliostat.cli("base-model", "add", BASE_MODEL, str(find_gguf()))
        for name, run in measure(heliostat, options, runs):
            runs[name] = run
            file.write_text(json.dumps(runs, indent=2) + "\n")
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        heliostat.stop()
        shutil.rmtree(folder, ignore_errors=True)
    (options.out / "quality.md").write_text(as_markdown(runs))
    print(f"\n{as_markdown(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
