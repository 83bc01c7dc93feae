"""The first process of the tenant's side: imports once, forks one rank per slot, passes messages on, answers for ranks that
are not there yet or no more. Leaves, with all of its tree, when its socket ends.

`python -m trainers.child.launcher`, with the socket's number in HELIOSTAT_CONTROL_FD."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import select
import selectors
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any

from trainers.config import TrainConfig
from trainers.protocol import FD_VARIABLE, Channel, Message, pair

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "GLOO_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    # Threads that spin cost a busy machine half its speed (measured: 5.2 against 2.2 s a step), those that sleep at once an idle
    # one a quarter (1.3 against 1.0 s): they spin for some microseconds. The second name is that of GCC's OpenMP, which torch has.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Rank:
    number: int
    pid: int
    channel: Channel


class Launcher:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ranks: dict[int, Rank] = {}
        self._state = "starting"
        self._step = 0
        self._pending: dict[Any, str] = {}
        self._spans_nodes = False
        self._selector = selectors.DefaultSelector()

    def serve(self) -> None:
        """Returns at end of file."""
        threading.Thread(target=self._leave_on_hangup, name="hangup", daemon=True).start()
        self._channel.send("hello", **_versions())
        self._selector.register(self._channel, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._channel:
                    message = self._channel.receive()
                    if message is None:
                        return
                    self._from_worker(message)
                else:
                    self._from_rank(key.data)

    def end_ranks(self) -> None:
        for rank in list(self._ranks.values()):
            os.kill(rank.pid, signal.SIGKILL)

    def _leave_on_hangup(self) -> None:
        """Also while the main thread imports, forks or waits for room in the socket."""
        poll = select.poll()
        poll.register(self._channel.fileno(), 0)
        poll.poll()
        self.end_ranks()
        os._exit(0)

    def _from_worker(self, message: Message) -> None:
        if message["type"] == "start" and self._state == "starting":
            self._start(message["config"])
        elif message["type"] == "command":
            self._command(message)
        elif message["type"] == "release":
            self._release(message)
        else:
            self._tell(0, message)

    def _release(self, message: Message) -> None:
        for number in set(self._ranks) - {0}:
            self._tell(number, message)

    def _start(self, fields: dict[str, Any]) -> None:
        self._state = "loading"
        try:
            config = TrainConfig.from_dict(fields)
        except TypeError as error:
            self._fail("config_invalid", f"The configuration is not understood: {error}")
            return
        if config.devices == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self._spans_nodes = config.spans_nodes
        if config.world_size > 1:
            _meet(config.meeting_point or f"127.0.0.1:{_free_port()}")
        for number in range(config.first_rank, config.first_rank + config.ranks_here):
            self._fork(config, number)

    def _fork(self, config: TrainConfig, number: int) -> None:
        ours, theirs = pair()
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_rank(config, number, theirs, parent)
        theirs.close()
        rank = Rank(number, pid, ours)
        self._ranks[number] = rank
        self._selector.register(ours, selectors.EVENT_READ, rank)

    def _become_rank(self, config: TrainConfig, number: int, wire: Channel, parent: int) -> None:
        """Does not return."""
        code = 1
        try:
            _die_with(parent)
            for other in [self._channel, *(rank.channel for rank in self._ranks.values())]:
                other.close()
            local = str(number - config.first_rank)
            os.environ.update(RANK=str(number), LOCAL_RANK=local, WORLD_SIZE=str(config.world_size))
            from trainers.child.rank import (
                run_rank,  # loaded already; here because the launcher says hello without torch
            )

            run_rank(config, number, config.world_size, wire)
            code = 0
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _command(self, message: Message) -> None:
        if 0 not in self._ranks or self._state in ("finished", "failed"):
            if message["command"] == "stop" and self._state == "starting":
                self._state = "finished"
            self._answer(message["id"], message["command"])
        elif message["command"] == "stop" and self._state == "loading":
            # nothing is trained yet, so there is nothing to save and no step to wait for
            self._state = "finished"
            self._pending[message["id"]] = "stop"
            self.end_ranks()
        else:
            self._pending[message["id"]] = message["command"]
            self._tell(0, message)

    def _tell(self, number: int, message: Message) -> None:
        """A rank that is ending cannot be told; its end of file is dealt with when it comes."""
        if number in self._ranks:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._ranks[number].channel.send(**message)

    def _from_rank(self, rank: Rank) -> None:
        message = rank.channel.receive()
        if message is None:
            self._gone(rank)
        elif message["type"] == "release":
            self._release(message)
            if self._spans_nodes:
                self._channel.send(**message)
        elif message["type"] == "failed":
            if self._state not in ("finished", "failed"):
                self._state = "failed"
                self._channel.send(**message)
        else:
            self._pass_on(message)

    def _pass_on(self, message: Message) -> None:
        if message["type"] == "ready":
            self._state = "training"
        elif message["type"] == "finished":
            self._state = "finished"
        elif message["type"] == "ack":
            self._pending.pop(message["id"], None)
        self._step = max(self._step, message.get("step", 0))  # a checkpoint is told of when it lies on the disk
        self._channel.send(**message)

    def _gone(self, rank: Rank) -> None:
        """A rank's end of file: it has said all that it had to say."""
        self._selector.unregister(rank.channel)
        rank.channel.close()
        _, status = os.waitpid(rank.pid, 0)
        del self._ranks[rank.number]
        if status != 0 and self._state not in ("finished", "failed"):
            code = os.waitstatus_to_exitcode(status)
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            self._fail("rank_lost", f"Rank {rank.number} ended by {how} without a word.")
        if status != 0:
            self.end_ranks()
        if not self._ranks:
            if self._state != "failed":
                self._state = "finished"
            for id, command in self._pending.items():
                self._answer(id, command)
            self._pending.clear()

    def _answer(self, id: Any, command: str) -> None:
        self._channel.send("ack", id=id, command=command, state=self._state, step=self._step)

    def _fail(self, code: str, message: str) -> None:
        self._state = "failed"
        hint = "The log has more. Start the job again; if a signal ended it, look at the machine's memory."
        self._channel.send("failed", code=code, message=message, hint=hint, fixable_by="operator", step=self._step)


def _die_with(parent: int) -> None:
    """This process ends when the one that forked it does, however that happens."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _meet(at: str) -> None:
    host, port = at.rsplit(":", 1)
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=port)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _versions() -> dict[str, Any]:
    """Imports all that the ranks need, so that they find it done. Nothing of it is garbage: without a collector the imports
    take four fifths of the time, and what it never looks at stays shared with the forked ranks."""
    gc.disable()
    import peft
    import torch
    import transformers

    import trainers.child.rank  # noqa: F401

    gc.freeze()
    gc.enable()
    return {
        "pid": os.getpid(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    launcher = Launcher(Channel.from_fd(int(os.environ[FD_VARIABLE])))
    try:
        launcher.serve()
    except (BrokenPipeError, ConnectionResetError):
        pass  # end of file, met while sending
    finally:
        launcher.end_ranks()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
