"""Makes a sandbox for one process: the words to put before its command, and the descriptors that they read."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from runtime_envs.sandbox.command import Given, command_line
from runtime_envs.sandbox.seccomp import program
from runtime_envs.sandbox.spec import HOME, Mode, Sandbox
from runtime_envs.sandbox.tools import found_programs

SIGNALLED = 128


@dataclass(frozen=True)
class Prepared:
    """`command` goes before the program's absolute path, `fds` into Popen's `pass_fds`. Nothing else is inherited."""

    command: tuple[str, ...]
    fds: tuple[int, ...]


@contextmanager
def prepared(sandbox: Sandbox, mode: Mode) -> Iterator[Prepared]:
    """Its descriptors are good for one start, inside of this context. Start it from a thread that lives as long as it shall:
    the sandbox dies with that thread."""
    uid = sandbox.uid if mode is Mode.ROOT else os.getuid()
    gid = sandbox.uid if mode is Mode.ROOT else os.getgid()
    with ExitStack() as stack:
        files = {path: _readable(stack, text.encode()) for path, text in _files(uid, gid).items()}
        rules = program()
        seccomp_fd = None if rules is None else _readable(stack, rules)
        given = Given(found_programs(), files, seccomp_fd)
        fds = [*files.values(), *([] if seccomp_fd is None else [seccomp_fd])]
        yield Prepared(tuple(command_line(sandbox, mode, given)), tuple(fds))


def exit_code(code: int) -> int:
    """bubblewrap passes a signal on as a shell does; negative again, as subprocess has it. Only signals with a name: a
    process can choose any exit status."""
    number = code - SIGNALLED
    return -number if number in {int(known) for known in signal.Signals} else code


def _readable(stack: ExitStack, data: bytes) -> int:
    fd = os.memfd_create("sandbox", 0)
    stack.callback(os.close, fd)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _files(uid: int, gid: int) -> dict[str, str]:
    """Libraries look up the name and the home of who they run as, and localhost."""
    return {
        "/etc/passwd": f"root:x:0:0:root:/:/sbin/nologin\njob:x:{uid}:{gid}:job:{HOME}:/bin/sh\n",
        "/etc/group": f"root:x:0:\njob:x:{gid}:\n",
        "/etc/hosts": "127.0.0.1 localhost job\n::1 localhost\n",
    }
