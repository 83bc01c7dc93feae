"""Traces of real or made-up clusters: CSV in, jobs out, in the order of their submission. It judges the rows, not the cluster."""

from __future__ import annotations

import csv
import gzip
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, cast

from cluster.core.job import Priority
from cluster.core.kinds import resolve_kind
from cluster.errors import HeliostatError, InvalidRequest

REQUIRED = ("timestamp", "duration", "num_gpus")


@dataclass(frozen=True)
class TraceJob:
    """`number`: its row after a stable sort by time. `submitted_s`: since the first job. `duration_s`: with its slots, undisturbed."""

    number: int
    submitted_s: float
    duration_s: float
    slots: int
    tenant: str
    priority: Priority = Priority.NORMAL
    kinds: tuple[str, ...] = ()


def read_trace(path: Path) -> list[TraceJob]:
    """Columns timestamp (ISO, UTC unless it says otherwise, or seconds), duration (s), num_gpus, cluster (the tenant);
    optional: priority, gpu_type. Raises `InvalidRequest` with the line that is wrong."""
    try:
        with _opened(path) as file:
            rows = list(_rows(file))
    except (OSError, UnicodeDecodeError, EOFError, csv.Error) as error:
        raise InvalidRequest(
            f"{path} cannot be read: {error}", param="TRACE", hint="a CSV file, plain or .gz"
        ) from error
    if not rows:
        raise InvalidRequest(f"{path} holds no jobs", param="TRACE")
    rows.sort(key=lambda row: row.submitted_s)
    first = rows[0].submitted_s
    return [
        TraceJob(number, row.submitted_s - first, row.duration_s, row.slots, row.tenant, row.priority, row.kinds)
        for number, row in enumerate(rows)
    ]


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8", newline=""))
    return path.open(encoding="utf-8", newline="")


def _rows(file: TextIO) -> Iterator[TraceJob]:
    reader = csv.DictReader(file)
    missing = [name for name in REQUIRED if name not in (reader.fieldnames or ())]
    if missing:
        raise InvalidRequest(
            f"the trace has no column {', '.join(missing)}",
            param="TRACE",
            hint="columns: timestamp, duration, num_gpus, cluster; optional: priority, gpu_type",
        )
    for row in reader:
        try:
            yield _job(row)
        except HeliostatError as error:
            raise InvalidRequest(f"line {reader.line_num}: {error.message}", param="TRACE", hint=error.hint) from error
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"line {reader.line_num}: {error}", param="TRACE") from error


def _job(row: Mapping[str, str | None]) -> TraceJob:
    submitted, duration = seconds_of(row["timestamp"] or ""), float(row["duration"] or "")
    slots = float(row["num_gpus"] or "")
    if not math.isfinite(submitted) or not math.isfinite(duration) or duration < 0:
        raise ValueError(f"duration {row['duration']} or timestamp {row['timestamp']} is no finite time")
    if not slots.is_integer() or slots < 1:
        raise ValueError(f"num_gpus {row['num_gpus']} is no positive whole number")
    kind = row.get("gpu_type") or ""
    return TraceJob(
        0,
        submitted,
        duration,
        int(slots),
        row.get("cluster") or "",
        Priority(row.get("priority") or Priority.NORMAL),
        (resolve_kind(kind),) if kind else (),
    )


def seconds_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
