"""One rank's process of a tenant's script: how it is started, what it is told by its environment, and what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trainers.child.custom import processes
from trainers.child.custom.shown.heliostat import FD_VARIABLE as JOB_FD
from trainers.config import TrainConfig
from trainers.protocol import FD_VARIABLE, Channel, pair

SHOWN = Path(__file__).parent / "shown"
"""What a script may import of ours: the module `heliostat`, nothing else of the house."""
TAIL_BYTES = 2000
TAIL_LINES = 10
READ_BYTES = 1 << 16


@dataclass(frozen=True)
class Places:
    """Below the run's output folder."""

    output: Path
    checkpoints: Path
    custody: Path

    @classmethod
    def make(cls, config: TrainConfig) -> Places:
        root = Path(config.output_dir)
        places = cls(root / "output", root / "checkpoints", root / "kept")
        for folder in (places.output, places.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        return places


@dataclass(eq=False)
class Script:
    """`printed`: the pipe with its output. `ended`: readable when the process has. `is_here`: it has the control object.
    `waits`: what it has said and was not answered yet: `between` or `saved`. `yields`: it has called `between`. `saves`:
    with a function that saves."""

    number: int
    process: subprocess.Popen[bytes]
    channel: Channel
    printed: int
    ended: int
    many: bool
    is_here: bool = False
    waits: str | None = None
    saves: bool = False
    yields: bool = False
    _tail: bytearray = field(default_factory=bytearray)
    _within_line: bool = False

    def echo(self) -> bool:
        """What it has printed goes on to our own output, with its rank where there are several; False at the end."""
        data = os.read(self.printed, READ_BYTES)
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        sys.stdout.buffer.write(self._named(data))
        sys.stdout.buffer.flush()
        return bool(data)

    def echo_rest(self) -> None:
        """Of one that has ended; somebody it left behind may still hold the pipe."""
        while select.select([self.printed], [], [], 0)[0] and self.echo():
            pass

    def last_lines(self) -> str:
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-TAIL_LINES:]) or "it printed nothing"

    def tell(self, type: str, **fields: Any) -> None:
        """One that is ending cannot be told."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.channel.send(type, **fields)

    def close(self) -> None:
        self.channel.close()
        os.close(self.printed)
        os.close(self.ended)

    def _named(self, data: bytes) -> bytes:
        if not self.many:
            return data
        name = f"[rank {self.number}] ".encode()
        named = b"".join(name + line for line in data.splitlines(keepends=True))
        begun, self._within_line = self._within_line, not data.endswith(b"\n")
        return named.removeprefix(name) if begun else named


def start(config: TrainConfig, places: Places, number: int, port: int) -> Script:
    """An interpreter of its own, as on the tenant's own machine: what it imports, and when, is its business."""
    ours, theirs = pair()
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *(config.entrypoint or ())],
        env=environment(config, places, number, port) | {JOB_FD: str(theirs.fileno())},
        cwd=config.code,
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=writing,
        pass_fds=(theirs.fileno(),),
        preexec_fn=partial(processes.die_with, os.getpid()),
    )
    theirs.close()
    os.close(writing)
    return Script(number, process, ours, reading, os.pidfd_open(process.pid), config.world_size > 1)


def environment(config: TrainConfig, places: Places, number: int, port: int) -> dict[str, str]:
    """Variables that have no value in this run are not set."""
    inherited = {name: value for name, value in os.environ.items() if name != FD_VARIABLE}
    ours = {
        "PYTHONPATH": str(SHOWN),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(config.world_size),
        "LOCAL_WORLD_SIZE": str(config.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "HELIOSTAT_PARAMS": json.dumps(config.params),
        "HELIOSTAT_CODE": config.code,
        "HELIOSTAT_MODEL": config.base_model,
        "HELIOSTAT_START_FROM": config.adapter,
        "HELIOSTAT_DATA": str(Path(config.train_file).parent),
        "HELIOSTAT_OUTPUT": str(places.output),
        "HELIOSTAT_CHECKPOINTS": str(places.checkpoints),
        "HELIOSTAT_RESUME_FROM": config.resume_from,
    }
    return inherited | {name: value for name, value in ours.items() if value is not None}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
