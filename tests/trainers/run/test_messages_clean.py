"""What a child says is made fit for the database before it is believed."""

from __future__ import annotations

import pytest

from cluster.errors import JobFailure
from trainers.run.messages import checked


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b"])
def test_text_that_postgresql_cannot_hold_is_replaced(text: str) -> None:
    cleaned = checked({"type": "log", "level": "info", "message": text, "more": [{text: text}]})
    assert cleaned["message"] in ("a\ufffdb", "a?b")
    cleaned["message"].encode()
    assert str(cleaned["more"]).isprintable()


@pytest.mark.parametrize(
    ("tokens", "fits"), [(3_000_000_000, True), (2**63 - 1, True), (2**63, False), (-(2**63), False)]
)
def test_whole_numbers_have_at_most_64_bits(tokens: int, fits: bool) -> None:
    message = {"type": "checkpoint", "step": 1, "path": "x", "sha256": {"f": "0" * 64}, "metrics": {"n": [tokens]}}
    if fits:
        assert checked(message) == message
    else:
        with pytest.raises(JobFailure, match="64 bits"):
            checked(message)


@pytest.mark.parametrize("action", [-1, 4, 10**4000, True, "1", None])
def test_only_what_rank_0_can_decide_is_released(action: object) -> None:
    with pytest.raises(JobFailure):
        checked({"type": "release", "action": action})
