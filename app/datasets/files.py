"""Uploaded files as numbered rows: JSON lines, JSON array, Parquet, CSV. Streams; only a JSON array is held whole.

Row numbers count from 1: the line in JSON lines, else the record."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator
from enum import StrEnum
from typing import IO, Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from app.datasets.problems import BadRow, DatasetRefused, mapping_required, not_utf8
from cluster.errors import TooLarge

CHUNK_BYTES = 1024 * 1024
MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 128 * 1024 * 1024
csv.field_size_limit(MAX_ROW_BYTES)

Numbered = tuple[int, dict[str, Any] | BadRow]


class FileType(StrEnum):
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


SUFFIXES = {
    "jsonl": FileType.JSONL,
    "ndjson": FileType.JSONL,
    "json": FileType.JSON,
    "csv": FileType.CSV,
    "parquet": FileType.PARQUET,
    "pq": FileType.PARQUET,
}


def file_type(file: IO[bytes], filename: str, asked: str) -> FileType:
    """`asked` is `auto` or a file type. Content decides where it is plain (Parquet, `[`), then the name's ending."""
    if asked != "auto":
        return FileType(asked)
    file.seek(0)
    head = file.read(4096)
    if head.startswith(b"PAR1"):
        return FileType.PARQUET
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")):
        raise DatasetRefused(
            "the file is compressed",
            code="unsupported_file",
            hint="Unpack it, or use Parquet.",
        )
    named = SUFFIXES.get(filename.rsplit(".", 1)[-1].lower()) if "." in filename else None
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if named in (None, FileType.JSON, FileType.JSONL) and start in (b"[", b"{"):
        return FileType.JSON if start == b"[" else FileType.JSONL
    return named or FileType.JSONL


def rows(file: IO[bytes], type: FileType, columns: dict[str, str]) -> Iterator[Numbered]:
    """`columns`: field → column; empty keeps the rows as they are. Raises `DatasetRefused`, `TooLarge`."""
    if type is FileType.PARQUET:
        found = _parquet(file)
    else:
        _check_utf8(file)
        found = _csv(file, columns) if type is FileType.CSV else _json(file, type)
    for number, row in found:
        yield number, _renamed(row, columns) if columns and isinstance(row, dict) else row


def _renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any] | BadRow:
    missing = sorted(field for field, column in columns.items() if column not in row)
    if missing:
        return BadRow(f"it lacks the column that the mapping names for {', '.join(missing)}")
    return {field: row[column] for field, column in columns.items()}


def _check_utf8(file: IO[bytes]) -> None:
    file.seek(0)
    decoder, consumed, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    while True:
        chunk = file.read(CHUNK_BYTES)
        held = len(decoder.getstate()[0])
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            # `error.object` is what the decoder held back plus this chunk
            good = error.object[: error.start]
            raise not_utf8(consumed - held + error.start, line + good.count(b"\n")) from None
        if not chunk:
            return
        consumed += len(chunk)
        line += chunk.count(b"\n")


def _json(file: IO[bytes], type: FileType) -> Iterator[Numbered]:
    return _json_array(file) if type is FileType.JSON else _json_lines(file)


def _json_lines(file: IO[bytes]) -> Iterator[Numbered]:
    file.seek(0)
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise _long_row(number)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return BadRow(f"it is not JSON: {error.msg.split(':')[0]} at character {error.colno}")
    return row if isinstance(row, dict) else BadRow("it is not a JSON object")


def _json_array(file: IO[bytes]) -> Iterator[Numbered]:
    file.seek(0)
    data = file.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise TooLarge(
            f"a JSON array may have {MAX_ARRAY_BYTES} bytes at most",
            param="file",
            hint="Upload it as JSON lines.",
        )
    try:
        items = orjson.loads(data.removeprefix(codecs.BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise DatasetRefused(
            f"the file is not JSON: {error.msg.split(':')[0]} at line {error.lineno} column {error.colno}",
            code="not_json",
            hint="A JSON file is one array of objects; for an object a line name it .jsonl.",
        ) from None
    if not isinstance(items, list):
        raise DatasetRefused("the file is not a JSON array of objects", code="not_json", hint="Wrap the rows in [ ].")
    for number, item in enumerate(items, start=1):
        yield number, item if isinstance(item, dict) else BadRow("it is not a JSON object")


def _csv(file: IO[bytes], columns: dict[str, str]) -> Iterator[Numbered]:
    file.seek(0)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        yield from _csv_records(reader, columns)
    except csv.Error as error:
        raise DatasetRefused(
            f"the file is not valid CSV: {error} (line {reader.line_num})",
            code="not_csv",
            hint='Quote fields that hold commas, quotes or line ends, and double the quotes in them: "so ""quoted"""',
        ) from None
    finally:
        text.detach()  # the caller's file stays open


def _csv_records(reader: Any, columns: dict[str, str]) -> Iterator[Numbered]:
    headers = next(reader, None)
    if headers is None:
        return
    if not columns:
        raise mapping_required(headers)
    absent = sorted(set(columns.values()) - set(headers))
    if absent:
        problem = mapping_required(headers)
        raise DatasetRefused(
            f"the mapping names columns that the file does not have: {', '.join(column[:40] for column in absent)}",
            code="unknown_column",
            param="map",
            hint=problem.hint,
        )
    records = (record for record in reader if record)
    for number, record in enumerate(records, start=1):
        if len(record) != len(headers):
            yield number, BadRow(f"it has {len(record)} fields, the header has {len(headers)}")
        else:
            yield number, dict(zip(headers, record, strict=True))


def _parquet(file: IO[bytes]) -> Iterator[Numbered]:
    file.seek(0)
    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: no Python value for it
        reason = (
            str(error).splitlines()[0] if number == 0 and isinstance(error, pa.ArrowInvalid) else type(error).__name__
        )
        raise DatasetRefused(
            f"the file is not readable Parquet ({reason[:200]})",
            code="bad_parquet",
            hint="Write it again and upload it.",
        ) from None


def _long_row(number: int) -> TooLarge:
    return TooLarge(
        f"row {number} has more than {MAX_ROW_BYTES} bytes", param="file", hint="Split it; no model takes rows so long."
    )
