"""Files of every type become the same canonical rows; what cannot be used is refused by number and reason."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.datasets.formats import _meant
from app.datasets.ingest import Ingested, Source, ingest, parse_columns
from app.datasets.problems import DatasetRefused
from cluster.errors import InvalidRequest, TooLarge

MIB = 1024 * 1024
SECRET = "my-secret-value"


def ingested(content: bytes, filename: str = "rows.jsonl", **source: Any) -> tuple[Ingested, list[dict[str, Any]]]:
    sink = io.BytesIO()
    made = ingest(Source(io.BytesIO(content), filename, **source), sink, 10 * MIB)
    return made, [json.loads(line) for line in sink.getvalue().splitlines()]


def refusal(content: bytes, filename: str = "rows.jsonl", **source: Any) -> DatasetRefused:
    with pytest.raises(DatasetRefused) as caught:
        ingested(content, filename, **source)
    assert SECRET not in f"{caught.value} {caught.value.report} {caught.value.hint}"
    return caught.value


QA = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in QA).encode()
CSV = b"question,answer,id\nq0,a0,1\nq1,a1,2\nq2,a2,3\n"
COLUMNS = {"prompt": "question", "completion": "answer"}


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "filename", "source"),
    [
        (LINES, "rows.jsonl", {}),
        (LINES, "", {}),
        (b"\xef\xbb\xbf" + LINES, "rows.txt", {}),
        (LINES.replace(b"\n", b"\r\n\r\n").rstrip(), "rows.jsonl", {}),
        (json.dumps(QA, indent=2).encode(), "rows.json", {}),
        (json.dumps(QA).encode(), "rows.jsonl", {}),
        (LINES, "rows.json", {}),
        (parquet(QA), "rows.parquet", {}),
        (parquet(QA), "rows", {}),
        (CSV, "rows.csv", {"columns": COLUMNS}),
        (b"\xef\xbb\xbf" + CSV, "rows.csv", {"columns": COLUMNS}),
        (CSV, "rows", {"type": "csv", "columns": COLUMNS}),
    ],
)
def test_every_file_type_gives_the_same_rows(content: bytes, filename: str, source: dict[str, Any]) -> None:
    made, rows = ingested(content, filename, **source)
    assert rows == QA
    assert (made.rows, made.format, made.max_chars) == (3, "prompt_completion", 4)
    assert made.sha256 == ingested(LINES)[0].sha256


def test_nested_parquet_messages() -> None:
    turns = [{"role": "user", "content": "q", "weight": None}, {"role": "assistant", "content": "a", "weight": 1}]
    made, rows = ingested(parquet([{"messages": turns, "split": "train"}]), "x.parquet")
    assert rows == [{"messages": [{"role": "user", "content": "q"}, turns[1]]}]
    assert made.report["warnings"][-1] == "Fields that are not used: split."


def test_the_report_counts_and_warns() -> None:
    report = ingested(LINES + LINES)[0].report
    assert (report["rows"], report["file_type"], report["chars"]["max"]) == (6, "jsonl", 4)
    assert report["warnings"] == ["3 rows repeat an earlier row."]
    assert "one row only" in ingested(LINES.splitlines()[0])[0].report["warnings"][0]


def test_bad_rows_are_named_by_number_and_never_shown() -> None:
    bad = json.dumps({"prompt": SECRET, "completion": ""}).encode()
    content = LINES + bad + b"\n{" + SECRET.encode() + b"\n" + json.dumps({SECRET: 1}).encode() + b"\n[1]\n" + LINES
    error = refusal(content)
    assert error.code == "bad_rows" and error.report is not None
    assert [row["row"] for row in error.report["bad_rows"]] == [4, 5, 6, 7]
    assert "row 4: completion is empty" in error.message


def test_at_most_100_bad_rows_are_listed() -> None:
    error = refusal(LINES + b"{}\n" * 250)
    assert error.report is not None
    assert (len(error.report["bad_rows"]), error.report["bad_rows_total"]) == (100, 250)


def test_what_was_meant_is_looked_for_once_not_for_every_row() -> None:
    """A million rows with the wrong keys took minutes, and one row with a very long key too."""
    _meant.cache_clear()
    rows = b'{"question": "q", "compltion": "a"}\n' * 5000 + json.dumps({"x" * 3 * MIB: 1}).encode()
    assert "did you mean completion?" in refusal(rows).message
    assert _meant.cache_info().misses == 2


def test_one_file_has_one_format() -> None:
    error = refusal(LINES + b'{"text": "t"}\n')
    assert "row 4: it has the format text, the first row has prompt_completion" in error.message


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  ", b"[]"])
def test_an_empty_file_is_refused(content: bytes) -> None:
    assert refusal(content).code == "empty_dataset"


@pytest.mark.parametrize("before", [0, MIB - 3, MIB, 3 * MIB + 17])
def test_wrong_encoding_is_told_by_byte_and_line(before: int) -> None:
    head = b'{"text": "' + "ä".encode() * (before // 2) + b'"}\n'
    error = refusal(head + b'{"text": "caf\xe9"}\n')
    assert error.code == "not_utf8"
    assert f"byte {len(head) + 13} (line 2)" in error.message


def test_a_cut_off_character_at_the_end_is_told_too() -> None:
    error = refusal(LINES + "ä".encode()[:1])
    assert f"byte {len(LINES)} (line 4)" in error.message


def test_utf_16_is_refused() -> None:
    assert "byte 0" in refusal(LINES.decode().encode("utf-16")).message


def test_csv_needs_a_mapping_and_says_its_columns() -> None:
    error = refusal(CSV, "rows.csv")
    assert error.code == "csv_mapping_required" and "question, answer, id" in (error.hint or "")
    assert refusal(CSV, "rows.csv", columns={"prompt": "frage", "completion": "answer"}).code == "unknown_column"


def test_csv_rows_of_another_width_are_bad() -> None:
    assert (
        "row 2: it has 2 fields, the header has 3"
        in refusal(b"question,answer,id\nq,a,1\nq,a\n", "x.csv", columns=COLUMNS).message
    )
    assert refusal(b'question,answer\n"q"x,a\n', "x.csv", columns=COLUMNS).code == "not_csv"


def test_a_mapping_renames_json_too() -> None:
    rows = ingested(b'{"question": "q0", "answer": "a0", "x": 1}', columns=COLUMNS)[1]
    assert rows == QA[:1]
    assert "the mapping names for completion" in refusal(b'{"question": "q"}', columns=COLUMNS).message


@pytest.mark.parametrize("pairs", [["prompt"], ["prompt="], ["nonsense=x"], ["prompt=a", "prompt=b"]])
def test_a_mapping_that_is_none_is_refused(pairs: list[str]) -> None:
    with pytest.raises(InvalidRequest):
        parse_columns(pairs)


def test_broken_files_are_refused() -> None:
    assert refusal(b"PAR1" + SECRET.encode() * 9, "x.parquet").code == "bad_parquet"
    assert refusal(parquet(QA)[:-20], "x.parquet").code == "bad_parquet"
    assert refusal(b'[{"text": "t"}', "x.json").code == "not_json"
    assert refusal(b'"' + SECRET.encode() + b'"', "x.json", type="json").code == "not_json"
    assert refusal(b"\x1f\x8b" + SECRET.encode(), "x.jsonl.gz").code == "unsupported_file"


def test_deep_nesting_is_a_bad_row() -> None:
    assert refusal(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}").code == "bad_rows"


def test_a_row_and_the_rows_together_have_a_limit() -> None:
    with pytest.raises(TooLarge, match="row 1 has more than"):
        ingested(b'{"text": "' + b"x" * (17 * MIB))
    with pytest.raises(TooLarge, match="the rows have more than"):
        ingest(Source(io.BytesIO(LINES), "x.jsonl"), io.BytesIO(), 5)


def test_json_lines_are_never_held_whole(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as sink:
        for number in range(8_000):
            sink.write(b'{"text": "%d %s"}\n' % (number, b"x" * 5000))
    with file.open("rb") as source, (tmp_path / "out").open("wb") as out:
        tracemalloc.start()
        made = ingest(Source(source, "rows.jsonl"), out, 100 * MIB)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert made.rows == 8_000
    assert peak < 12 * MIB < file.stat().st_size / 3
