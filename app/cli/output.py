"""What a person or a program sees: tables and text on stdout, notes and errors on stderr; with `--json` JSON only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from app.cli.errors import ServiceError, error_object
from cluster.errors import HeliostatError

PIPE_WIDTH = 240
"""Columns where stdout is no terminal: a program that reads a table must not lose the ends of its cells."""

CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(0x7F, 0xA0)) if code not in (9, 10)}


def clean(text: str) -> str:
    """Text of others (logs, messages, names) without the control characters that could steer a terminal."""
    return text.translate(CONTROL)


class Output:
    def __init__(self, *, as_json: bool) -> None:
        self.json = as_json
        self.console = _console(stderr=False)
        self.errors = _console(stderr=True)

    @property
    def live(self) -> bool:
        """Whether moving pictures make sense."""
        return self.console.is_terminal and not self.json

    def show(self, data: Any, render: Callable[[], RenderableType]) -> None:
        """One object: as JSON, or as `render` draws it."""
        if self.json:
            self.document(data)
        else:
            drawn = render()  # a bare text is one word (a token): never broken, whoever reads it
            self.console.print(drawn, markup=False, highlight=False, soft_wrap=isinstance(drawn, str))

    def document(self, data: Any) -> None:
        print(json.dumps(data, ensure_ascii=False, indent=2), flush=True)

    def item(self, data: Any) -> None:
        """One object of a stream: one line."""
        print(json.dumps(data, ensure_ascii=False, separators=(",", ":")), flush=True)

    def say(self, text: str, style: str = "") -> None:
        """A line for people; nothing with `--json`."""
        if not self.json:
            self.console.print(Text(clean(text), style), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line beside the result: progress, advice."""
        if not self.json:
            self.errors.print(Text(clean(text), "dim"), soft_wrap=True)

    def error(self, error: HeliostatError) -> None:
        if self.json:
            print(json.dumps(error_object(error), ensure_ascii=False), file=sys.stderr, flush=True)
            return
        self.errors.print(error_block(error), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=PIPE_WIDTH)
    return console


def error_block(error: HeliostatError) -> Text:
    """Message, then what to do, then what support needs."""
    block = Text.assemble(("Error: ", "bold red"), clean(error.message))
    if error.param:
        block.append(f"\n  field: {clean(error.param)}")
    if error.hint:
        block.append(f"\n  hint:  {clean(error.hint)}", "yellow")
    marks = f"\n  code:  {clean(error.code)}"
    if isinstance(error, ServiceError) and error.request_id:
        marks += f"   request: {clean(error.request_id)}"
    block.append(marks, "dim")
    return block


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing here yet") -> RenderableType:
    """Cells are taken as plain text. Numbers stand to the right."""
    rows = [tuple(row) for row in rows]
    if not rows:
        return Text(empty, "dim")
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = all(isinstance(row[number], int | float) for row in rows)
        drawn.add_column(column.upper(), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell(value)) for value in row))
    return drawn


def pairs(items: Iterable[tuple[str, Any]]) -> RenderableType:
    """Key and value, one pair a line; pairs without a value are left out."""
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for key, value in items:
        if value is not None and value not in ("", [], {}):
            drawn.add_row(key, Text(cell(value)))
    return drawn


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={cell(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list | tuple):
        return ", ".join(cell(inner) for inner in value)
    return clean(str(value))
