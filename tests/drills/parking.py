"""`make drill`: two trainings alternate on the same slots for twenty switches, alone and with two ranks each, parked between steps, in
evaluations, while a checkpoint is written, and while one rank lags behind.

    python -m tests.drills.parking [--switches 20] [--seed 1]

Every loss must be that of the run that was alone; who is parked must not compute, and have no more memory than when it
trains. On a CPU it has hardly less: weights and optimizer have nowhere else to go, only the allocator's free memory is given
back. Each case is a line in
benchmarks/drills/parking.jsonl; one that stands there for this commit is not run again."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from builders_child import zygote  # noqa: E402
from parking import MOMENTS, take_turns  # noqa: E402

from tests.drills.records import Records  # noqa: E402

GROWTH = 1.02
"""The memory of a parked child, of that which it had some steps before, at most: it may have written a checkpoint meanwhile."""
IDLE_SHARE = 0.02
"""Of a core, at most, that a parked child may use."""


def run_case(ranks: int, switches: int, seed: int) -> dict[str, Any]:
    """Raises AssertionError."""
    with zygote() as started, tempfile.TemporaryDirectory(prefix="ht-") as scratch:
        turns = take_turns(started, Path(scratch), ranks, switches, random.Random(f"{seed}/{ranks}"))
    share = turns.parked_cpu_s / turns.parked_s
    assert share <= IDLE_SHARE, f"a parked training used {share:.1%} of a core"
    medians = {
        f"{name}_median": round(statistics.median(one[name] for one in turns.switches), 4)
        for name in ("park_s", "resume_s", "to_step_s", "mib_before", "mib_parked")
    }
    assert medians["mib_parked_median"] <= GROWTH * medians["mib_before_median"], (
        f"a parked training holds more: {medians}"
    )
    slowest = {moment: max(one["park_s"] for one in turns.switches if one["moment"] == moment) for moment in MOMENTS}
    return {**medians, "park_s_slowest": slowest, "parked_cores": round(share, 4), "parked_s": round(turns.parked_s, 1)}


def drill(switches: int, seed: int, records: Records) -> bool:
    """Whether all went well."""
    cases = [{"ranks": ranks, "switches": switches, "seed": seed} for ranks in (1, 2)]
    for case in cases:
        if any(case.items() <= line.items() for line in records.lines()):
            continue
        try:
            records.add({**case, "ok": True, **run_case(case["ranks"], switches, seed)})
        except AssertionError as error:
            records.add({**case, "ok": False, "error": str(error)[:2000]})
    return all(line["ok"] for line in records.lines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--switches", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    sys.exit(0 if drill(arguments.switches, arguments.seed, Records("parking")) else 1)


if __name__ == "__main__":
    main()
