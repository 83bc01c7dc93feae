"""Whatever a model answers, an evaluation fits into one message."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders_child import Child, make_config
from builders_llama import write_rows
from builders_methods import label_rows, make_tiny_bert

from trainers.child.samples import ALL_BYTES, SAMPLE_CHARS, samples
from trainers.protocol import pair

EMOJI = "\N{GRINNING FACE}" * 3000


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_long_texts_outside_of_the_basic_plane_fit(count: int) -> None:
    ours, theirs = pair()
    shown = samples([(f"{EMOJI}?", EMOJI, f"!{EMOJI}")] * count)
    ours.send("evaluated", step=1, when="before", loss=1.0, rows=50, samples=shown)
    received = theirs.receive(1.0)
    assert received is not None and received["samples"] == shown and len(shown) == count
    for one in shown:
        assert one["prompt"].endswith("\N{GRINNING FACE}?") and one["answer"].startswith("!\N{GRINNING FACE}")
        assert all(len(text) >= min(SAMPLE_CHARS, ALL_BYTES // (3 * 12 * count)) for text in one.values())
    ours.close()
    theirs.close()


def test_plain_texts_have_two_thousand_characters() -> None:
    (shown,) = samples([("a" * 3000 + "b", "c" * 3000, "d")])
    assert shown == {"prompt": "a" * (SAMPLE_CHARS - 1) + "b", "expected": "c" * SAMPLE_CHARS, "answer": "d"}


def test_a_classifier_of_emoji_goes_on(child: Child, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", [{**row, "text": f"{row['text']} {EMOJI}"} for row in label_rows(8)])
    bert, fields = make_tiny_bert(tmp_path / "bert"), {"task": "sequence_classification", "validation_file": str(rows)}
    child.run(make_config(bert, rows, tmp_path / "out", max_steps=1, sample_rows=8, **fields))
    assert len(child.of("evaluated")[0]["samples"]) == 8
