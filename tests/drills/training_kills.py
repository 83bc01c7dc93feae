"""`make drill`: SIGKILL to the processes of a training (launcher or rank) at seeded random moments: loading, between steps, in an
evaluation, while a checkpoint is written, while it is uploaded. Each run goes on from its newest durable checkpoint.

    python -m tests.drills.training_kills [--seed 1]

Four jobs of five kills, two of them on two slots. Losses and weights must be the undisturbed run's, bit for bit, with one row a
step and no half checkpoint under a name. A job is a line in benchmarks/drills/training_kills.jsonl; one that stands there for this
commit is not run again."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from builders_llama import make_tiny_llama  # noqa: E402
from training_kills import Kill, KilledJob, draw_kills, run_with_kills  # noqa: E402

from tests.drills.records import Records  # noqa: E402

MOMENTS = (
    ("loading", "writing", "step", "evaluation", "upload"),
    ("writing", "writing", "evaluation", "loading", "step"),
    ("writing", "upload", "step", "writing", "evaluation"),
    ("step", "writing", "evaluation", "upload", "writing"),
)
RANKS = (1, 1, 2, 2)
HALF = 5
"""So many of the twenty kills at least must have left half a checkpoint behind."""


def run_job(number: int, seed: int, base: Path, root: Path) -> dict[str, Any]:
    """Raises AssertionError."""
    ranks = RANKS[number]
    alone = KilledJob(root / "alone", base, ranks)
    alone.attempt()
    job = KilledJob(root / "killed", base, ranks)
    kills: list[Kill] = draw_kills(random.Random(f"{seed}/{number}"), MOMENTS[number], ranks)
    hits = list(run_with_kills(job, kills))
    assert job.result() == alone.result(), "losses and weights are those of the undisturbed run"
    return {"kills": [{**hit, "target": kill.target} for hit, kill in zip(hits, kills, strict=True)]}


def drill(seed: int, records: Records) -> bool:
    """Whether all went well."""
    done = {line["job"] for line in records.lines() if line["seed"] == seed}
    for number in sorted(set(range(len(MOMENTS))) - done):
        began = time.monotonic()
        line: dict[str, Any] = {"job": number, "seed": seed, "ranks": RANKS[number]}
        with tempfile.TemporaryDirectory(prefix="ht-") as scratch:
            root = Path(scratch)
            try:
                line |= {"ok": True, **run_job(number, seed, make_tiny_llama(root / "tiny"), root)}
            except AssertionError as error:
                line |= {"ok": False, "error": str(error)[:2000]}
        records.add({**line, "seconds": round(time.monotonic() - began, 1)})
    lines = [line for line in records.lines() if line["seed"] == seed]
    half = sum(kill["half_checkpoint"] for line in lines for kill in line.get("kills", []))
    print(f"{half} kills left half a checkpoint behind")
    return all(line["ok"] for line in lines) and half >= HALF


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(0 if drill(parser.parse_args().seed, Records("training_kills")) else 1)


if __name__ == "__main__":
    main()
