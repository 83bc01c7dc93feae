"""From an uploaded file to canonical rows and a report, in one pass and bounded memory. Stores nothing itself."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from app.datasets.files import FileType, file_type, rows
from app.datasets.formats import FIELDS, Format, canonical, detect, task_of, unused
from app.datasets.preview import chars
from app.datasets.problems import LISTED_ROWS, BadRow, bad_rows, empty
from cluster.errors import InvalidRequest, TooLarge

LONG_CHARS = 16_000
EXPANSION = 8
"""Canonical rows may have so many times the limit of an upload: Parquet unpacks."""


REMEMBERED_ROWS = 500_000
"""Repeated rows are looked for among so many, to keep memory bounded."""


@dataclass(frozen=True)
class Source:
    """`type`: auto or a `FileType`; `columns`: field → column of the file."""

    file: IO[bytes]
    filename: str
    type: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ingested:
    format: Format
    task: str
    rows: int
    bytes: int
    sha256: str
    max_chars: int
    report: dict[str, Any]


@dataclass
class _Tally:
    rows: int = 0
    size: int = 0
    bad_total: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("I"))
    ignored: Counter[str] = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)
    repeated: int = 0

    def refuse(self, number: int, reason: str) -> None:
        self.bad_total += 1
        if len(self.bad) < LISTED_ROWS:
            self.bad.append({"row": number, "reason": reason})

    def accept(self, row: dict[str, Any], line: bytes, left_out: set[str]) -> None:
        self.lengths.append(chars(row))
        self.size += len(line)
        self.ignored.update(left_out)
        key = hashlib.blake2b(line, digest_size=8).digest()
        self.repeated += key in self.seen
        if len(self.seen) < REMEMBERED_ROWS:
            self.seen.add(key)


def ingest(source: Source, sink: IO[bytes], max_bytes: int) -> Ingested:
    """Writes canonical JSON lines to `sink`. Raises `DatasetRefused` when any row is bad, `TooLarge`."""
    type = file_type(source.file, source.filename, source.type)
    tally, digest, format = _Tally(), hashlib.sha256(), None
    for number, found in rows(source.file, type, source.columns):
        tally.rows += 1
        try:
            row = _good(found)
            format = format or detect(row)
            stored = canonical(row, _same(row, format))
            line = _line(stored)
        except BadRow as reason:
            tally.refuse(number, str(reason))
            continue
        tally.accept(stored, line, unused(row, format))
        if tally.size > max_bytes * EXPANSION:
            raise TooLarge(f"the rows have more than {max_bytes * EXPANSION} bytes", param="file", hint="Split it.")
        digest.update(line)
        sink.write(line)
    if tally.bad_total:
        raise bad_rows(tally.rows, tally.bad, tally.bad_total)
    if format is None:
        raise empty()
    report = _report(tally, format, type)
    return Ingested(format, task_of(format), tally.rows, tally.size, digest.hexdigest(), max(tally.lengths), report)


def _good(found: dict[str, Any] | BadRow) -> dict[str, Any]:
    if isinstance(found, BadRow):
        raise found
    return found


def _line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row) + b"\n"
    except orjson.JSONEncodeError:  # bytes from Parquet, lists within lists within lists
        raise BadRow("it holds a value that JSON cannot hold, or too many levels of nesting") from None


def _same(row: dict[str, Any], first: Format) -> Format:
    """A file has one format: mixed ones would be trained with different masks unnoticed."""
    now = detect(row)
    if now is not first:
        raise BadRow(f"it has the format {now}, the first row has {first}")
    return first


def _report(tally: _Tally, format: Format, type: FileType) -> dict[str, Any]:
    lengths = sorted(tally.lengths)
    return {
        "rows": tally.rows,
        "format": str(format),
        "task": task_of(format),
        "file_type": str(type),
        "chars": {
            "min": lengths[0],
            "mean": round(sum(lengths) / len(lengths), 1),
            "p50": lengths[len(lengths) // 2],
            "p95": lengths[int((len(lengths) - 1) * 0.95)],
            "max": lengths[-1],
            "total": sum(lengths),
        },
        "warnings": _warnings(tally),
        "bad_rows": [],
        "bad_rows_total": 0,
    }


def _warnings(tally: _Tally) -> list[str]:
    found = []
    if tally.rows == 1:
        found.append("There is one row only: a model will learn it by heart and little else.")
    if tally.repeated:
        found.append(f"{tally.repeated} rows repeat an earlier row.")
    long = sum(length > LONG_CHARS for length in tally.lengths)
    if long:
        found.append(f"{long} rows have more than {LONG_CHARS} characters and may be truncated in training.")
    if tally.ignored:
        names = ", ".join(name[:40] for name, _ in tally.ignored.most_common(10))
        found.append(f"Fields that are not used: {names}.")
    return found


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """`prompt=question` → {"prompt": "question"}. Raises `InvalidRequest`."""
    columns: dict[str, str] = {}
    for pair in pairs:
        target, equals, column = pair.partition("=")
        if not equals or not column or target not in FIELDS or target in columns:
            raise InvalidRequest(
                "`map` takes field=column, each field once",
                code="invalid_map",
                param="map",
                hint=f"For instance `prompt=question`. Fields: {', '.join(sorted(FIELDS))}.",
            )
        columns[target] = column
    return columns


def check_type(asked: str) -> str:
    known = ["auto", *FileType]
    if asked not in known:
        raise InvalidRequest(
            f"`format` is none of {', '.join(known)}", code="invalid_format", param="format", hint="Leave it out: auto."
        )
    return asked
