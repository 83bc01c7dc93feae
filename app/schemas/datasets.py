"""Datasets as users see them."""

from __future__ import annotations

from typing import Any, Literal

from app.schemas.common import Answer


class Dataset(Answer):
    """One version of a named dataset. `ref` is what requests may use."""

    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    version: int
    ref: str
    status: Literal["ready"] = "ready"
    format: str
    task: str
    rows: int
    bytes: int
    max_chars: int
    sha256: str
    source_sha256: str
    warnings: list[str]
    created_at: int


class DatasetReport(Answer):
    object: Literal["dataset.report"] = "dataset.report"
    dataset_id: str
    rows: int
    format: str
    task: str
    file_type: str
    chars: dict[str, float]
    warnings: list[str]
    bad_rows: list[dict[str, Any]]
    bad_rows_total: int


class Span(Answer):
    """`loss`: whether the model learns from this text."""

    role: str
    text: str
    loss: bool
    truncated: bool


class PreviewRow(Answer):
    row: int
    spans: list[Span]


class DatasetPreview(Answer):
    object: Literal["dataset.preview"] = "dataset.preview"
    dataset_id: str
    rows: list[PreviewRow]
