"""The memory estimator held against what a training takes: `make bench-memory`.

Models made from configs with random weights are trained for two steps by the child's own code, each in a process of its own that
is forked after the imports, as the launcher forks a rank. Measured is the peak of its resident memory above what it began with
(anonymous pages and mapped weights alike), with a memory limit as the service enforces it; a few settings are measured again
without a limit, where glibc keeps what is freed."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.hardware import hardware  # noqa: E402
from trainers.run.footprint import GIB, Training  # noqa: E402
from trainers.run.memory import estimate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
GOAL = 0.10
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gated(kind: str, hidden: int, layers: int, kv: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": kv, "head_dim": 64, "vocab_size": 16000}
    return {"model_type": kind, **sizes, **heads, "max_position_embeddings": 4096, **TOKENS, **more}


# Classifiers have few words: a frozen embedding that nothing but the rows' own words reads stays in its file otherwise.
MODELS: dict[str, dict[str, Any]] = {
    "llama-38m": gated("llama", 512, 10, 4, tie_word_embeddings=True),
    "llama-30m": gated("llama", 512, 10, 4, tie_word_embeddings=True, vocab_size=1000),
    "llama-140m": gated("llama", 768, 16, 4, tie_word_embeddings=False, vocab_size=24000),
    "qwen2-50m": gated("qwen2", 640, 8, 2, tie_word_embeddings=True, vocab_size=32000),
    "qwen3-40m": gated("qwen3", 512, 10, 4, tie_word_embeddings=True),
    "mistral-38m": gated("mistral", 512, 10, 2, tie_word_embeddings=False, sliding_window=None),
    "gemma-45m": gated("gemma", 512, 8, 1, vocab_size=32000),
    "gemma2-30m": gated("gemma2", 512, 6, 4),
    "gemma3-38m": gated("gemma3_text", 512, 8, 4),
    "gemma3-window": gated("gemma3_text", 512, 8, 4, sliding_window=256, sliding_window_pattern=4),
    "mistral-window": gated("mistral", 512, 10, 2, tie_word_embeddings=False, sliding_window=256),
    "gpt2-34m": {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 16000, **TOKENS},
    "bert-27m": {
        "model_type": "bert",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "vocab_size": 1000,
        "pad_token_id": 0,
    },
}
MODELS["roberta-27m"] = {**MODELS["bert-27m"], "model_type": "roberta", "type_vocab_size": 1, **TOKENS}


@dataclass(frozen=True)
class Setting:
    """`seq_len`: of every row. `micro_batch` None: as the child chooses it."""

    model: str
    training_type: str = "lora"
    precision: str = "fp32"
    seq_len: int = 512
    batch_size: int = 2
    micro_batch: int | None = None
    method: str = "sft"
    task: str = "causal_lm"
    packing: bool = True
    lora_r: int = 16
    validates: bool = False
    checkpointing: bool = False
    bounded: bool = True

    def training(self) -> Training:
        shared = {key: value for key, value in asdict(self).items() if key not in ("model", "micro_batch", "validates")}
        rows = self.micro_batch or (1 if self.packing else 16384 // self.seq_len)
        validation_len = self.seq_len if self.validates else 0
        return Training(**shared, micro_batch=rows, validation_len=validation_len, on_cpu=True)


SETTINGS = [
    Setting("llama-38m"),
    Setting("llama-38m", precision="bf16"),
    Setting("llama-38m", batch_size=6, seq_len=256, lora_r=64),
    Setting("llama-38m", "full"),
    Setting("llama-38m", "full", "bf16"),
    Setting("llama-38m", "full", "bf16", batch_size=4),
    Setting("llama-38m", "full", batch_size=1, seq_len=128),
    Setting("llama-38m", packing=False, micro_batch=1),
    Setting("llama-38m", precision="bf16", packing=False, micro_batch=4, batch_size=4, seq_len=256),
    Setting("llama-38m", batch_size=1, seq_len=1536),
    Setting("llama-38m", precision="bf16", method="dpo", seq_len=256),
    Setting("llama-38m", "full", method="dpo", seq_len=256, batch_size=1),
    Setting("llama-140m", precision="bf16", seq_len=256, batch_size=1),
    Setting("llama-140m", precision="fp32", seq_len=128, batch_size=2),
    Setting("llama-140m", "full", "bf16", seq_len=256, batch_size=1),
    Setting("llama-140m", "full", "fp32", seq_len=128, batch_size=1),
    Setting("qwen2-50m"),
    Setting("qwen2-50m", precision="bf16", batch_size=4, seq_len=256),
    Setting("qwen2-50m", "full", "bf16"),
    Setting("qwen3-40m"),
    Setting("qwen3-40m", "full"),
    Setting("mistral-38m", precision="bf16"),
    Setting("mistral-38m", "full", "bf16", seq_len=256, batch_size=2),
    Setting("gemma-45m", precision="bf16"),
    Setting("gemma-45m", "full"),
    Setting("gemma2-30m", seq_len=256),
    Setting("gemma3-38m", precision="bf16"),
    Setting("gpt2-34m"),
    Setting("gpt2-34m", "full", batch_size=2, seq_len=256),
    Setting("bert-27m", task="sequence_classification", packing=False, batch_size=8, micro_batch=8, seq_len=128),
    Setting(
        "bert-27m", "full", task="sequence_classification", packing=False, batch_size=4, micro_batch=4, seq_len=256
    ),
    Setting("llama-30m", task="sequence_classification", packing=False, batch_size=4, micro_batch=4, seq_len=256),
    Setting("llama-38m", validates=True, seq_len=512, batch_size=1),
    Setting("qwen2-50m", precision="bf16", validates=True, seq_len=384, batch_size=2),
    Setting("llama-38m", batch_size=1, seq_len=1536, checkpointing=True),
    Setting("llama-38m", "full", "bf16", batch_size=1, seq_len=1024, checkpointing=True),
    Setting("gpt2-34m", batch_size=1, seq_len=512, checkpointing=True),
    Setting("roberta-27m", task="sequence_classification", packing=False, batch_size=8, micro_batch=8, seq_len=128),
    Setting("gemma3-window", precision="bf16", seq_len=1024),
    Setting("mistral-window", seq_len=1024),
    Setting("mistral-window", "full", "bf16", seq_len=1024, batch_size=1),
    Setting("mistral-window", precision="bf16", seq_len=1024, checkpointing=True),
]
WITHOUT_LIMIT = [replace(SETTINGS[at], bounded=False) for at in (0, 1, 3, 5, 16, 18)]


def make_model(config: dict[str, Any], folder: Path, dtype: str) -> None:
    """A folder with random weights and the tests' tokenizer."""
    import torch
    from builders_llama import make_tokenizer
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if config["model_type"] in ("bert", "roberta") else AutoModelForCausalLM
    torch.manual_seed(0)
    made = kind.from_config(CONFIG_MAPPING[config["model_type"]](**config))
    made.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def write_rows(setting: Setting, file: Path) -> None:
    """More rows than two steps need, each longer than it may be and none like another."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choice("bcdghjklmnpqvwxyz") for _ in range(tokens))

    def row(number: int) -> dict[str, Any]:
        if setting.method == "dpo":  # sides of the whole length that share nothing but the first letter
            return {
                "prompt": "z",
                "chosen": "b" + text(setting.seq_len + 9),
                "rejected": "c" + text(setting.seq_len + 9),
            }
        if setting.validates:  # questions of nearly the whole length
            return {"prompt": text(setting.seq_len - 12), "completion": text(4)}
        if setting.task == "sequence_classification":
            return {"text": text(setting.seq_len + 9), "label": "ab"[number % 2]}
        return {"text": text(setting.seq_len + 9)}

    rows = [row(number) for number in range(16 if setting.validates else 4 * setting.batch_size)]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def train(setting: Setting, folder: Path) -> int:
    """Bytes at the peak above those at the beginning, of this process."""
    from builders_child import Recorder, make_config

    from trainers.child.memory import peak_resident_bytes, resident_bytes
    from trainers.child.rank import run_rank

    with tempfile.TemporaryDirectory() as scratch:
        write_rows(setting, Path(scratch) / "rows.jsonl")
        config = make_config(
            folder,
            Path(scratch) / "rows.jsonl",
            Path(scratch) / "out",
            max_steps=2,
            batch_size=setting.batch_size,
            micro_batch_size=setting.micro_batch,
            max_seq_len=setting.seq_len,
            packing=setting.packing,
            lora_r=setting.lora_r,
            lora_dropout=0.0,
            lr=1e-4,
            checkpoint_every_s=1e9,
            gradient_checkpointing=setting.checkpointing,
            validation_file=str(Path(scratch) / "rows.jsonl") if setting.validates else None,
            memory_limit_gb=1000.0 if setting.bounded else None,
            **{name: getattr(setting, name) for name in ("training_type", "precision", "method", "task")},
        )
        before = resident_bytes()
        run_rank(config, 0, 1, Recorder())
        return peak_resident_bytes() - before


def measure(setting: Setting, folder: Path) -> dict[str, Any]:
    """In a process of its own. Raises RuntimeError when it fails."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def work() -> None:
        theirs.send(train(setting, folder))

    process = fork.Process(target=work)
    process.start()
    theirs.close()
    try:
        measured = ours.recv()
    except EOFError:
        raise RuntimeError(f"{setting} failed; its output says why") from None
    finally:
        process.join()
    made = estimate(json.loads((folder / "config.json").read_text()), setting.training())
    estimated = made.total_gb
    return {
        **asdict(setting),
        "parameters_m": round(made.parameters / 1e6, 1),
        "measured_gb": round(measured / GIB, 3),
        "estimated_gb": estimated,
        "rule_gb": made.rule_gb,
        "error": round(estimated * GIB / measured - 1, 4),
        "parts_mb": {name: round(size / 2**20) for name, size in made.parts.items()},
    }


def run(settings: list[Setting], folder: Path) -> list[dict[str, Any]]:
    fork = multiprocessing.get_context("fork")
    found = []
    for setting in settings:
        model = folder / f"{setting.model}-{setting.precision}"
        if not model.exists():
            maker = fork.Process(target=make_model, args=(MODELS[setting.model], model, setting.precision))
            maker.start()
            maker.join()
        found.append(measure(setting, model))
        print(_row(found[-1]), flush=True)
    return found


def _row(one: dict[str, Any]) -> str:
    rows = one["micro_batch"] or ("packed" if one["packing"] else "auto")
    way = f"{one['method'] if one['task'] == 'causal_lm' else 'classify'} {one['training_type']} {one['precision']}"
    way += ", validated" if one["validates"] else ""
    way += ", computed twice" if one["checkpointing"] else ""
    sizes = f"{one['seq_len']} | {one['batch_size']} | {rows}"
    figures = f"{one['measured_gb']:.3f} | {one['estimated_gb']:.2f} | {one['error']:+.1%} | {one['rule_gb']:.2f}"
    return f"| {one['model']} | {one['parameters_m']} | {way} | {sizes} | {figures} |"


def summary(found: list[dict[str, Any]]) -> str:
    errors = [abs(one["error"]) for one in found]
    within = sum(error <= GOAL for error in errors)
    return (
        f"{within} of {len(errors)} within {GOAL:.0%}; median {statistics.median(errors):.1%}, worst {max(errors):.1%}"
    )


def table(found: list[dict[str, Any]], free: list[dict[str, Any]], note: str) -> str:
    head = [
        "| model | M parameters | way | tokens a row | rows a step | rows a pass | measured GiB | estimated | error | 2.5× rule, GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    without = (
        f"Without a limit, where glibc keeps part of what is freed: {summary(free)}."
        if free
        else "Not measured without a limit."
    )
    return "\n".join(
        [
            "# Memory: estimated from config.json, and measured",
            "",
            note,
            "",
            "Peak of resident memory above the imports, two steps of the child's own code on a CPU, one thread.",
            "",
            f"With a memory limit: {summary(found)}.",
            "",
            "Gemma 2 caps its logits. With random weights they are too small for that to show, so that the child takes the way in",
            "which the logits never exist whole; the estimate is of a model with learned weights, which has to take the other.",
            "",
            *head,
            *map(_row, found),
            "",
            without,
            "",
            *(head if free else []),
            *map(_row, free),
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0; nothing is recorded")
    parser.add_argument("--models", type=Path, help="a folder that keeps the models that are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    from trainers.child import launcher

    os.environ.update(launcher.ENVIRONMENT, DS_ACCELERATOR="cpu")
    launcher._versions()  # the imports, before any rank is forked
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.models or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.only is not None:
            run([SETTINGS[at] for at in args.only], folder)
            return 0
        found, free = run(SETTINGS, folder), run(WITHOUT_LIMIT, folder)
    machine = hardware()
    note = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}, commit {machine['commit']}"
    args.results.mkdir(parents=True, exist_ok=True)
    written = {"hardware": machine, "with_limit": found, "without_limit": free}
    (args.results / "memory.json").write_text(json.dumps(written, indent=1) + "\n")
    (args.results / "memory.md").write_text(table(found, free, note))
    print(summary(found))
    return 0 if all(abs(one["error"]) <= GOAL for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
