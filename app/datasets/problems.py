"""What can be wrong with an upload, said once. A row's content never appears: only its number and the reason."""

from __future__ import annotations

from typing import Any

from cluster.errors import FixableBy, InvalidRequest

LISTED_ROWS = 100


class DatasetRefused(InvalidRequest):
    """The upload cannot be used. `report` goes to the user beside the message."""

    code = "dataset_refused"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = "file",
        hint: str | None = None,
        fixable_by: FixableBy | None = None,
        report: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param, hint=hint, fixable_by=fixable_by)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.message, self.code, self.param, self.hint, self.fixable_by, self.report)


def _rebuild(
    message: str,
    code: str,
    param: str | None,
    hint: str | None,
    fixable_by: FixableBy,
    report: dict[str, Any] | None,
) -> DatasetRefused:
    return DatasetRefused(message, code=code, param=param, hint=hint, fixable_by=fixable_by, report=report)


class BadRow(ValueError):
    """One row cannot be used; the text is the reason."""


def bad_rows(rows: int, bad: list[dict[str, Any]], total: int) -> DatasetRefused:
    first = "; ".join(f"row {item['row']}: {item['reason']}" for item in bad[:3])
    more = f"; and {total - 3} more" if total > 3 else ""
    return DatasetRefused(
        f"{total} of {rows} rows cannot be used, so the dataset was not stored ({first}{more})",
        code="bad_rows",
        hint="Repair or remove these rows and upload again; `report.bad_rows` lists up to 100 of them.",
        report={"rows": rows, "bad_rows_total": total, "bad_rows": bad},
    )


def not_utf8(offset: int, line: int) -> DatasetRefused:
    return DatasetRefused(
        f"the file is not UTF-8: byte {offset} (line {line}) cannot be decoded",
        code="not_utf8",
        hint="Save the file as UTF-8, for instance with `iconv -f LATIN1 -t UTF-8`.",
        report={"bad_rows": [{"row": line, "reason": f"byte {offset} is not UTF-8"}], "bad_rows_total": 1},
    )


def empty() -> DatasetRefused:
    return DatasetRefused(
        "the file has no rows", code="empty_dataset", hint="Upload a file with at least one row of training data."
    )


def mapping_required(headers: list[str]) -> DatasetRefused:
    shown = ", ".join(header[:40] for header in headers[:50])
    return DatasetRefused(
        "a CSV file needs a mapping that says which column is which field",
        code="csv_mapping_required",
        param="map",
        hint=f"The columns are: {shown}. Name fields by columns, for instance `--map prompt=COLUMN "
        "--map completion=COLUMN` (over HTTP: form fields `map`), or `text=COLUMN`.",
    )
