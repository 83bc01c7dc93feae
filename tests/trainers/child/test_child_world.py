"""What ranks tell each other, in two processes; and what of it is about random generators."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from trainers.child.checkpoint import _random_state, _restore_random
from trainers.child.world import World

RANK = """
import json, sys
import torch.distributed as dist
from torch.distributed import distributed_c10d
from trainers.child.world import World

distributed_c10d._unpickler = None  # nothing of another rank is unpickled
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
value = {"rank": rank, "numbers": list(range(3 + 1000 * rank)), "nothing": None, "exact": 0.1 + 0.2, "text": "\u00e9"}
print(json.dumps(World(rank, 2, "cpu", dist.new_group(backend="gloo")).gathered(value)))
dist.destroy_process_group()
"""


def test_values_of_all_ranks_come_to_the_first_one(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=PATIENCE_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    first, other = (json.loads(text) for text in said)
    assert other == []
    assert [(value["rank"], len(value["numbers"])) for value in first] == [(0, 3), (1, 1003)]
    assert all((value["nothing"], value["exact"], value["text"]) == (None, 0.1 + 0.2, "\u00e9") for value in first)


@pytest.mark.parametrize("sent", [lambda text: json.loads(json.dumps(text)), dict])
def test_random_generators_go_on_where_they_were(sent: Callable[[Any], Any]) -> None:
    random.gauss(0.0, 1.0)
    np.random.standard_normal()  # both keep a second number for later
    state = _random_state(World())
    drawn = _draws()
    assert _draws() != drawn
    _restore_random(sent(state))
    assert _draws() == drawn
    _restore_random({**state, "torch": torch.tensor(state["torch"], dtype=torch.uint8)})  # as older checkpoints have it
    assert _draws() == drawn


def _draws() -> list[float]:
    return [random.gauss(0.0, 1.0), random.random(), float(np.random.standard_normal()), *torch.rand(2).tolist()]
