"""How much there is to do, from what a request's estimate says."""

from __future__ import annotations

from typing import Any

import pytest

from app.services.run_times import estimated_tokens

WHOLE = {"tokens": 3000, "rows": 20, "steps": 9}


@pytest.mark.parametrize(
    ("estimate", "hyperparams", "tokens"),
    [
        (WHOLE, {"epochs": 3, "batch_size": 8}, 3000),
        ({**WHOLE, "steps": 3}, {"epochs": 3, "batch_size": 8}, 1000),  # max_steps
        ({**WHOLE, "steps": 0}, {"epochs": 3, "batch_size": 8}, 0),
        ({}, {}, 0),
        ({"tokens": 500, "steps": 4}, {"epochs": 1, "batch_size": 1}, 500),  # rows of an old estimate are unknown
    ],
)
def test_tokens_of_all_steps(estimate: dict[str, Any], hyperparams: dict[str, Any], tokens: float) -> None:
    assert estimated_tokens(estimate, hyperparams) == pytest.approx(tokens)
