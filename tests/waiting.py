"""Waiting in tests: poll with a deadline; and looking at processes that may go meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

PATIENCE_S = 120.0
"""It is there to end what hangs: however busy a machine is, nothing that is waited for takes so long."""

T = TypeVar("T")


def until(true: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.02)


def asked(question: Callable[[], T], gone: T) -> T:
    """What psutil answers of a process; `gone`: where there is none any more, or one that nobody has reaped."""
    try:
        return question()
    except psutil.NoSuchProcess:
        return gone


def lives(process: psutil.Process) -> bool:
    return process.is_running() and asked(process.status, psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE
