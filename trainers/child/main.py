"""The same training without a cluster: `python -m trainers.child.main config.json` prints each message as a line of JSON.
Under torchrun it is one of the ranks."""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainers.config import TrainConfig, launcher_of
from trainers.protocol import FD_VARIABLE, Message, pair

ONE_NODE_ONLY = ("GLOO_SOCKET_IFNAME", "MASTER_ADDR")
"""Of the launcher's environment: ranks of several nodes do not meet on the loopback."""


class Printer:
    """A rank's wire where there is no launcher: it prints, every checkpoint counts as durable where it lies, and nobody commands."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def send(self, type: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"type": type, **fields}) + "\n")
        sys.stdout.flush()
        if type == "checkpoint":
            self._answers.put({"type": "saved", "step": fields["step"]})

    def receive(self) -> Message | None:
        return self._answers.get()


def main(arguments: list[str] | None = None) -> int:
    """0: finished; 1: failed."""
    parser = argparse.ArgumentParser(description="Trains as a JSON file with the fields of TrainConfig says.")
    parser.add_argument("config", type=Path)
    config = json.loads(parser.parse_args(arguments).config.read_text(encoding="utf-8"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _as_rank(config)
    return _with_launcher(config)


def _as_rank(config: dict[str, Any]) -> int:
    from trainers.child.rank import run_rank

    for name, value in environment(os.environ).items():
        os.environ.setdefault(name, value)
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    here = {"node_ranks": int(os.environ["LOCAL_WORLD_SIZE"]), "first_rank": rank - int(os.environ["LOCAL_RANK"])}
    run_rank(TrainConfig.from_dict({**config, "world_size": size, **here}), rank, size, Printer())
    return 0


def environment(torchrun: Mapping[str, str]) -> dict[str, str]:
    """What a rank needs beside what torchrun has set."""
    from trainers.child.launcher import ENVIRONMENT

    one_node = torchrun["LOCAL_WORLD_SIZE"] == torchrun["WORLD_SIZE"]
    return {name: value for name, value in ENVIRONMENT.items() if one_node or name not in ONE_NODE_ONLY}


def _with_launcher(config: dict[str, Any]) -> int:
    """Plays the worker."""
    ours, theirs = pair()
    environment = {**os.environ, FD_VARIABLE: str(theirs.fileno())}
    command = [sys.executable, "-m", launcher_of(config.get("method", ""))]
    child = subprocess.Popen(command, env=environment, pass_fds=(theirs.fileno(),), stdout=sys.stderr)
    theirs.close()
    ours.send("start", config=config)
    code = 1
    while (message := ours.receive()) is not None:
        Printer().send(**message)
        if message["type"] == "checkpoint":
            ours.send("saved", step=message["step"])
        if message["type"] in ("finished", "failed"):
            code = 0 if message["type"] == "finished" else 1
            break
    ours.close()
    child.wait()
    return code


if __name__ == "__main__":
    sys.exit(main())
