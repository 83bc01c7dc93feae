"""What is printed for programs to read."""

from __future__ import annotations

import pytest

from app.cli.output import PIPE_WIDTH, Output


def test_a_long_token_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    token = "t" * (3 * PIPE_WIDTH)
    Output(as_json=False).show({}, lambda: token)
    assert capsys.readouterr().out == f"{token}\n"
