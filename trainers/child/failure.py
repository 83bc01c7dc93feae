"""Why a training cannot go on, with a stable code and a hint, and how an exception of a library becomes one."""

from __future__ import annotations

import errno
from typing import Any

MAX_MESSAGE_CHARS = 2000


class Stopped(Exception):
    """The run was told to stop; its checkpoint is written. Not a failure."""


class TrainFailure(Exception):
    """`fixable_by` user: the same run would fail again; operator or nobody: it may work elsewhere or later."""

    def __init__(self, code: str, message: str, *, hint: str | None = None, fixable_by: str = "user") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.fixable_by = fixable_by

    def fields(self) -> dict[str, Any]:
        """The fields of a `failed` message, but for the step."""
        return {
            "code": self.code,
            "message": self.message[:MAX_MESSAGE_CHARS],
            "hint": self.hint,
            "fixable_by": self.fixable_by,
        }


def describe(error: BaseException) -> TrainFailure:
    """The failure that `error` stands for: itself, memory, or something that nobody foresaw."""
    if isinstance(error, TrainFailure):
        return error
    text = f"{type(error).__name__}: {error}".strip()
    if is_memory(error):
        return TrainFailure(
            "out_of_memory",
            f"The training ran out of memory: {text}",
            hint="Lower batch_size or max_seq_len, use training_type lora, or ask for more memory.",
        )
    if _is_disk(error):
        hint = "Free some space on the node's disk. The last checkpoint is whole: the job goes on from it."
        return TrainFailure("disk_full", f"There is no room left to write to: {text}", hint=hint, fixable_by="operator")
    if isinstance(error, RuntimeError) and (lost := _lost_rank(text)) is not None:
        return lost
    if is_template_error(error):
        hint = "Most templates want user and assistant to take turns, and a system turn first if at all."
        return TrainFailure("row_not_renderable", f"The chat template refuses a row: {error}", hint=hint)
    if isinstance(error, OSError):
        return TrainFailure("io_error", f"A file could not be read or written: {text}", fixable_by="operator")
    hint = "The log has the traceback. If the data and the environment are right, this is a bug."
    return TrainFailure("training_error", f"The training code failed: {text}", hint=hint, fixable_by="operator")


_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "remote process exited",
    "remote error",
)


def _lost_rank(text: str) -> TrainFailure | None:
    """What gloo, and NCCL, say of another rank that hangs, or that is no more."""
    said = text.lower()
    if "timed out waiting" in said or "application timeout" in said:
        hint = "One of its processes stands still; the log may say why. The job goes on from its last checkpoint."
        message = f"A rank waited in vain for another one: {text}"
        return TrainFailure("rank_not_responding", message, hint=hint, fixable_by="nobody")
    if any(words in said for words in _GONE):
        hint = "If a signal ended it, look at the machine's memory. The job goes on from its last checkpoint."
        return TrainFailure("rank_lost", f"Another rank is gone: {text}", hint=hint, fixable_by="operator")
    return None


def _is_disk(error: BaseException) -> bool:
    """Also as safetensors and torch tell it, which raise errors of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = ("no space left on device", "pytorchstreamwriter failed writing", "unexpected pos")
    return any(words in str(error).lower() for words in said)


def is_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "MemoryError" in names or "OutOfMemoryError" in names:
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def is_template_error(error: BaseException) -> bool:
    """By name: not every environment has jinja."""
    return "TemplateError" in {kind.__name__ for kind in type(error).__mro__}
