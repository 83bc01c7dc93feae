"""Part of a sharded model against `torch.load` of the whole: `make bench-loading`.

One model in eight files, as safetensors and as torch's own; each load in a process of its own that is forked after the imports,
turn about, files in the page cache. What is loaded is read to the last number. Peak is of the process's resident memory, mapped
files included."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hardware import hardware  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LAYERS, FILES, GOAL = 8, 8, 0.5
Load = Callable[[Path], int]


def make_model(folder: Path) -> int:
    """About 430 MB in fp32, random; its bytes."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    sizes = {"self_attn.q_proj": (1024, 1024), "self_attn.o_proj": (1024, 1024), "mlp.up_proj": (4096, 1024)}
    sizes |= {"self_attn.k_proj": (1024, 1024), "self_attn.v_proj": (1024, 1024), "mlp.down_proj": (1024, 4096)}
    weights = {"model.embed_tokens.weight": torch.randn(8000, 1024)}
    for layer in range(LAYERS):
        weights |= {f"model.layers.{layer}.{name}.weight": torch.randn(*size) for name, size in sizes.items()}
    per_file, names = -(-len(weights) // FILES), list(weights)
    index: dict[str, str] = {}
    for number in range(FILES):
        part = {name: weights[name] for name in names[number * per_file : (number + 1) * per_file]}
        save_file(part, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        torch.save(part, folder / f"part-{number}.bin")
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(weight.nbytes for weight in weights.values())


def whole(folder: Path) -> int:
    """Bytes."""
    import torch

    weights: dict[str, Any] = {}
    for file in sorted(folder.glob("*.bin")):
        weights |= torch.load(file, weights_only=True)
    return _read(list(weights.values()))


def layers(count: int) -> Load:
    def load(folder: Path) -> int:
        from trainers.child.shards import Shards

        with Shards(folder) as shards:
            return _read([shards.read(name) for name in shards.layers(0, count)])

    return load


def _read(weights: list[Any]) -> int:
    for weight in weights:
        weight.sum()
    return sum(weight.nbytes for weight in weights)


WAYS: dict[str, Load] = {
    "torch.load of the whole": whole,
    f"a quarter of the layers ({LAYERS // 4})": layers(LAYERS // 4),
    f"half of the layers ({LAYERS // 2})": layers(LAYERS // 2),
    f"all layers ({LAYERS})": layers(LAYERS),
}


def measure(load: Load, folder: Path) -> dict[str, float]:
    """Seconds, and the peak above the beginning and what was loaded in MB, of a process of its own."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def work() -> None:
        import torch

        from trainers.child.memory import peak_resident_bytes, resident_bytes

        torch.set_num_threads(1)
        torch.ones(1 << 20).sum()  # the kernels' own pages
        before, began = resident_bytes(), time.perf_counter()
        loaded = load(folder)
        seconds = time.perf_counter() - began
        theirs.send({"seconds": seconds, "peak_mb": (peak_resident_bytes() - before) / 1e6, "loaded_mb": loaded / 1e6})

    process = fork.Process(target=work)
    process.start()
    theirs.close()
    found: dict[str, float] = ours.recv()
    process.join()
    return found


def table(found: dict[str, dict[str, float]], note: str) -> str:
    first = next(iter(found.values()))
    rows = [
        f"| {name} | {one['loaded_mb']:.0f} | {one['peak_mb']:.0f} | {one['peak_mb'] / first['peak_mb']:.2f} "
        f"| {one['seconds']:.2f} | {one['seconds'] / first['seconds']:.2f} |"
        for name, one in found.items()
    ]
    head = "| | loaded MB | peak MB | of the whole | seconds | of the whole |\n|---|---|---|---|---|---|"
    return f"# Loading part of a sharded model\n\n{note}\n\n{head}\n" + "\n".join(rows) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    import safetensors.torch  # noqa: F401  before any process is forked
    import torch  # noqa: F401

    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        maker = fork.Process(target=make_model, args=(folder,))
        maker.start()
        maker.join()
        runs = [{name: measure(load, folder) for name, load in WAYS.items()} for _ in range(args.repeats)]
    found = {name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in WAYS}
    machine = hardware()
    note = (
        f"{FILES} files, {LAYERS} layers, fp32, in the page cache; medians of {args.repeats}, turn about, one thread; "
        f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}, commit {machine['commit']}"
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "loading.json").write_text(json.dumps({"hardware": machine, "found": found}, indent=1) + "\n")
    (args.results / "loading.md").write_text(table(found, note))
    print(table(found, note))
    base, quarter = (found[name] for name in list(WAYS)[:2])
    met = all(quarter[key] <= GOAL * base[key] for key in ("seconds", "peak_mb"))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
