"""The rows of a run, as they lie in its files, and which of them are held out."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trainers.child.failure import TrainFailure
from trainers.config import TrainConfig

T = TypeVar("T")


class FileRow(dict[str, Any]):
    """A row that knows its number in its file, counted from 1."""

    def __init__(self, fields: Mapping[str, Any], number: int) -> None:
        super().__init__(fields)
        self.number = number


Rows = list[FileRow]


def numbers_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """In their file; their places among `rows` for those that are of none."""
    return [row.number if isinstance(row, FileRow) else place for place, row in enumerate(rows, 1)]


def read_data(config: TrainConfig) -> tuple[Rows, Rows]:
    """(rows to train on, rows to validate on: a file of their own, a share of the others, or none). Raises TrainFailure."""
    rows = _read(config.train_file)
    if config.validation_file:
        return rows, _read(config.validation_file)
    return split(rows, config.hyperparams.held_out(len(rows)), config.hyperparams.seed)


def _read(path: str) -> Rows:
    """Rows are named by number, never shown."""
    with Path(path).open(encoding="utf-8") as lines:
        return [_row(number, line, path) for number, line in enumerate(lines, 1) if line.strip()]


def _row(number: int, line: str, path: str) -> FileRow:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        hint = "Each line must be a JSON object; a dataset that was uploaded to the service is."
        raise TrainFailure("row_broken", f"Row {number} of {Path(path).name} is no JSON object.", hint=hint)
    return FileRow(row, number)


def count_long(lengths: Sequence[int], limit: int, overlength: str, numbers: Sequence[int]) -> int:
    """How many rows are longer than `limit` tokens; `numbers` are the rows'. Raises TrainFailure where that is an error."""
    long = [number for number, length in zip(numbers, lengths, strict=True) if length > limit]
    if long and overlength == "error":
        raise TrainFailure(
            "row_too_long",
            f"{len(long)} rows are longer than {limit} tokens, the first is row {long[0]}.",
            hint="Raise max_seq_len, shorten the rows, or set overlength to truncate or drop.",
        )
    return len(long)


def split(rows: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """`count` rows, drawn from the seed, on the second side; both in the order of the file."""
    held_out = set(random.Random(f"{seed}/validation").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]
