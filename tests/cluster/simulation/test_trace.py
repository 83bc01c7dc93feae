"""Traces: what is read, and what is refused with the line that is wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cluster.core.job import Priority
from cluster.errors import InvalidRequest
from cluster.simulation.trace import read_trace

HEAD = "timestamp,duration,num_gpus,cluster\n"


def written(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_rows_are_numbered_by_time_and_seconds_count_from_the_first(tmp_path: Path) -> None:
    jobs = read_trace(written(tmp_path, HEAD + "2017-10-09 07:01:55,66.0,1,a\n2017-10-09T07:00:55+00:00,5,8.0,b\n"))
    assert [(job.number, job.submitted_s, job.duration_s, job.slots, job.tenant) for job in jobs] == [
        (0, 0.0, 5.0, 8, "b"),
        (1, 60.0, 66.0, 1, "a"),
    ]


def test_rows_of_one_moment_keep_their_order(tmp_path: Path) -> None:
    assert [job.tenant for job in read_trace(written(tmp_path, HEAD + "7,1,1,b\n7,1,1,a\n"))] == ["b", "a"]


def test_gz_priority_and_kind(tmp_path: Path) -> None:
    text = "timestamp,duration,num_gpus,priority,gpu_type\n0,1,1,urgent,a100\n0,1,1,,\n"
    jobs = read_trace(written(tmp_path, text, "trace.csv.gz"))
    assert [(job.priority, job.kinds) for job in jobs] == [(Priority.URGENT, ("A100",)), (Priority.NORMAL, ())]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no column timestamp, duration, num_gpus"),
        ("timestamp,duration\n0,1\n", "no column num_gpus"),
        (HEAD, "holds no jobs"),
        (HEAD + "0,1,1,a\nyesterday,1,1,a\n", "line 3"),
        (HEAD + "0,,1,a\n", "line 2"),
        (HEAD + "0,-1,1,a\n", "line 2: duration -1"),
        (HEAD + "0,inf,1,a\n", "line 2"),
        (HEAD + "0,1,0,a\n", "line 2: num_gpus 0"),
        (HEAD + "0,1,1.5,a\n", "line 2: num_gpus 1.5"),
        (HEAD + "0\n", "line 2"),
        ("timestamp,duration,num_gpus,priority\n0,1,1,asap\n", "line 2"),
        ("timestamp,duration,num_gpus,gpu_type\n0,1,1,abacus\n", "line 2"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_trace(written(tmp_path, text))
    assert says in refused.value.message and refused.value.param == "TRACE"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    plain = tmp_path / "trace.csv.gz"
    plain.write_text(HEAD)
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress((HEAD + "0,1,1,a\n" * 50).encode())[:-10])
    for path in (tmp_path / "none.csv", tmp_path, plain, cut):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_trace(path)
