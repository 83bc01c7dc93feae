"""The messages between a worker (the Ray side) and its child (the tenant's side): JSON over a SEQPACKET socket, one message a
packet. Standard library only; shipped with the child; Python 3.10.

worker → child
    start     {config}                                   first message; `config` is a `trainers.config.TrainConfig` as a dict
    command   {id, command: checkpoint|park|resume|stop|ping}
    saved     {step}                                     the checkpoint of that step is durable; older ones may go
    dropped   {step}                                     that one will not be stored: a newer one was, or storage took none
    release   {action}                                   to parked ranks of another node than rank 0's: what that one does
child → worker
    hello     {pid, python, torch, transformers, peft, packages?}     imports are done
    progress  {what, done, total}                        of a long pass or step; total 0: not known
    ready     {steps, epochs, start_step, trainable_parameters, parameters, tokens_per_epoch, rows, threads, precision,
               kernels: torch|liger, worlds}
    evaluated {step, when: before|during|after, loss, exact_match?, rows, samples?: [{prompt, expected, answer}]}
    step      {step, epoch, loss, lr, grad_norm, tokens, seconds}
    checkpoint{step, path, bytes, sha256: {file: hex}, metrics}       complete on disk under `path`
    ack       {id, command, state, step}                 every command is answered in every state
    release   {action}                                   of rank 0, for the parked ranks of other nodes
    log       {level, message}
    failed    {code, message, hint, fixable_by, step}
    finished  {step, artifact: path, sha256: {file: hex}, metrics}
`ack` comes when the command has taken effect: checkpoint after its `checkpoint` (none, if that step has one already); park in
state parked, at a step's boundary; resume in the state gone on with; stop after a last `checkpoint`, in state finished, without
`finished` (while loading: at once, without a checkpoint); ping at once. Where a command can do nothing any more it is answered
with the state. `failed.fixable_by` user: the same run would fail again; operator or nobody: it may work when started again.
After finished and failed the launcher stays to answer until end of file.
States: starting, loading, training, evaluating, checkpointing, parked, finishing, finished, failed.
End of file on either side: the other is dead; the child leaves at once.
"""

from __future__ import annotations

import json
import signal
import socket
from typing import Any, Dict, Optional

MAX_MESSAGE_BYTES = 128 * 1024
"""Below the kernel's default socket buffer (212,992), so that one packet always fits."""

FD_VARIABLE = "HELIOSTAT_CONTROL_FD"
"""The environment variable that holds the number of the inherited socket."""

MARK_VARIABLE = "HELIOSTAT_ATTEMPT"
"""Every process of an attempt carries `<job>/<attempt>` in this variable, so that an agent finds orphans in /proc."""

COMMANDS = ("checkpoint", "park", "resume", "stop", "ping")

Message = Dict[str, Any]


class Channel:
    """One end of the conversation. Several threads may send; one receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, type: str, **fields: Any) -> None:
        """Raises ValueError when the message is too large, OSError when the other end is gone."""
        data = json.dumps({"type": type, **fields}, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"message {type} has {len(data)} bytes, the most is {MAX_MESSAGE_BYTES}")
        self._sock.send(data)

    def receive(self, timeout_s: Optional[float] = None) -> Optional[Message]:
        """The next message; None at end of file. Raises TimeoutError."""
        self._sock.settimeout(timeout_s)
        try:
            data = self._sock.recv(MAX_MESSAGE_BYTES + 1)
        except ConnectionResetError:
            return None
        if not data:
            return None
        message: Message = json.loads(data)
        return message

    def close(self) -> None:
        self._sock.close()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time ones have none
        return f"signal {number}"


def pair() -> "tuple[Channel, Channel]":
    """(worker's end, child's end); pass the child's file descriptor on with `pass_fds`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)
