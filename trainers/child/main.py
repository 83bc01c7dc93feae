"""The same training without a cluster: `python -m trainers.child.main config.json` prints each message as a line of JSON.
Under torchrun it is one of the ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from trainers.config import TrainConfig, launcher_of
from trainers.protocol import FD_VARIABLE, Message, pair


class Printer:
    """A rank's wire where there is no launcher: it prints, and nobody commands."""

    def send(self, type: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"type": type, **fields}) + "\n")
        sys.stdout.flush()

    def receive(self) -> Message | None:
        threading.Event().wait()  # nothing ever comes
        return None


def main(arguments: list[str] | None = None) -> int:
    """0: finished; 1: failed."""
    parser = argparse.ArgumentParser(description="Trains as a JSON file with the fields of TrainConfig says.")
    parser.add_argument("config", type=Path)
    config = json.loads(parser.parse_args(arguments).config.read_text(encoding="utf-8"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _as_rank(config)
    return _with_launcher(config)


def _as_rank(config: dict[str, Any]) -> int:
    from trainers.child.launcher import ENVIRONMENT
    from trainers.child.rank import run_rank

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    size = int(os.environ["WORLD_SIZE"])
    run_rank(TrainConfig.from_dict({**config, "world_size": size}), int(os.environ["RANK"]), size, Printer())
    return 0


def _with_launcher(config: dict[str, Any]) -> int:
    """Plays the worker: every checkpoint counts as durable where it lies."""
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
