"""What a child says is made fit for the database before it is believed."""

from __future__ import annotations

import pytest

from trainers.run.messages import checked


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
def test_text_that_postgresql_cannot_hold_is_replaced(text: str) -> None:
    cleaned = checked({"type": "log", "level": "info", "message": text, "more": [{text: text}]})
    assert cleaned["message"] in ("a\ufffdb", "a?b")
    cleaned["message"].encode()
    assert str(cleaned["more"]).isprintable()
