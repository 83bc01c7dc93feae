"""Answers that are shown with an evaluation: cut so that all of them fit into one message."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

from trainers.protocol import MAX_MESSAGE_BYTES

SAMPLE_CHARS = 2000
ALL_BYTES = MAX_MESSAGE_BYTES * 3 // 4
"""Of all texts as JSON, where a character may take twelve bytes; the rest of the message has the other quarter."""


def samples(told: Sequence[tuple[str, str, str]]) -> list[dict[str, str]]:
    """Of prompts, the answers that are expected, and those that were given. Of a prompt its end is shown."""
    most = ALL_BYTES // max(1, 3 * len(told))
    return [
        {"prompt": _cut(prompt[::-1], most)[::-1], "expected": _cut(expected, most), "answer": _cut(answer, most)}
        for prompt, expected, answer in told
    ]


def _cut(text: str, most_bytes: int) -> str:
    text = text[:SAMPLE_CHARS]
    ends = itertools.accumulate(len(json.dumps(character)) - 2 for character in text)
    return text[: sum(end <= most_bytes for end in ends)]
