"""Starts training children for tests: a zygote imports torch once, each test gets a launcher forked from it."""

from __future__ import annotations

import array
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers.config import Hyperparams, TrainConfig
from trainers.protocol import Channel, Message, pair

ZYGOTE = """
import array, os, signal, socket, sys, warnings
sys.path.insert(0, sys.argv[2])
exec(sys.argv[3])
from trainers.child import launcher
os.environ.update(launcher.ENVIRONMENT)
launcher._versions()
warnings.simplefilter("ignore")
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
wire = socket.socket(fileno=int(sys.argv[1]))
while True:
    data, extra, _, _ = wire.recvmsg(1, socket.CMSG_SPACE(4))
    if not data:
        break
    fd = array.array("i", extra[0][2])[0]
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        wire.close()
        os.environ["HELIOSTAT_CONTROL_FD"] = str(fd)
        launcher.main()
    os.close(fd)
"""


def make_config(base: Path, train: Path, out: Path, **fields: Any) -> TrainConfig:
    """A short run in fp32 with a checkpoint after every step; hyperparameters go by their own names."""
    known = set(Hyperparams.__dataclass_fields__)
    hyper = Hyperparams(
        **{
            "max_steps": 6,
            "lr": 1e-2,
            "batch_size": 4,
            "lora_r": 4,
            "lora_dropout": 0.1,
            **{key: fields.pop(key) for key in list(fields) if key in known},
        }
    )
    defaults: dict[str, Any] = {"precision": "fp32", "checkpoint_every_s": 0.0, "max_new_tokens": 4}
    return TrainConfig(
        base_model=str(base), train_file=str(train), output_dir=str(out), hyperparams=hyper, **{**defaults, **fields}
    )


class Child:
    """The worker's side of one launcher."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.messages: list[Message] = []
        self.pid = int(self.until("hello", timeout_s=180)["pid"])  # the first one waits for the imports

    def until(self, *types: str, timeout_s: float = 120.0) -> Message:
        """The next message of one of these types; all are kept."""
        while True:
            message = self.channel.receive(timeout_s)
            assert message is not None, f"end of file before {types}; the last was {self.messages[-1:]}"
            self.messages.append(message)
            if message["type"] in types:
                return message
            assert message["type"] != "failed", message

    def run(self, config: TrainConfig) -> list[Message]:
        """To the end; the step messages."""
        self.start(config)
        self.until("finished")
        return self.steps

    def start(self, config: TrainConfig) -> None:
        self.channel.send("start", config=config.to_dict())

    def command(self, command: str, id: int = 1) -> Message:
        """Its ack."""
        self.channel.send("command", id=id, command=command)
        return self.until("ack")

    @property
    def steps(self) -> list[Message]:
        return [message for message in self.messages if message["type"] == "step"]

    def of(self, type: str) -> list[Message]:
        return [message for message in self.messages if message["type"] == type]

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]


class Zygote:
    """`first`: Python that it runs before it imports anything else."""

    def __init__(self, first: str = "", **environment: str) -> None:
        ours, theirs = socket.socketpair()
        self._wire = ours
        self._channels: list[Channel] = []
        root = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, str(theirs.fileno()), root, first],
            pass_fds=(theirs.fileno(),),
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        )
        theirs.close()

    def child(self) -> Child:
        ours, theirs = pair()
        fds = array.array("i", [theirs.fileno()])
        self._wire.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        theirs.close()
        self._channels.append(ours)
        return Child(ours)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self._wire.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def zygote(first: str = "", **environment: str) -> Iterator[Zygote]:
    started = Zygote(first, **environment)
    try:
        yield started
    finally:
        started.close()


class Recorder:
    """A rank's wire inside the test's own process: keeps what is sent; `script` may command in answer to a message."""

    def __init__(self, script: Callable[[Message], list[Message]] = lambda message: []) -> None:
        self.messages: list[Message] = []
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._script = script

    def send(self, type: str, **fields: Any) -> None:
        message = {"type": type, **fields}
        self.messages.append(message)
        for answer in self._script(message):
            self._inbox.put(answer)

    def receive(self) -> Message | None:
        return self._inbox.get()

    def of(self, type: str) -> list[Message]:
        return [message for message in self.messages if message["type"] == type]


def numbers(steps: list[Message]) -> list[tuple[Any, ...]]:
    """What must not change from run to run."""
    return [(step["step"], step["loss"], step["grad_norm"], step["lr"], step["tokens"]) for step in steps]


def tree_of(pid: int) -> list[int]:
    """`pid` and its descendants that are alive."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            state, parent = stat.rpartition(")")[2].split()[:2]
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return [one for one in found if one in parents]
