"""The demo's rows: made by their script, balanced, without leaks, and not to be solved by counting words."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from examples.support import make_data

FOLDER = Path(make_data.__file__).parent
MOST_ALIKE = 0.6
"""Share of words that two texts of different splits may have in common (Jaccard)."""


def read(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def queues(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][2]["content"] for row in rows]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9äöüß]+", text.lower()))


def alike(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)


def test_committed_files_are_what_the_script_makes() -> None:
    for split, rows in zip(("train", "validation"), make_data.make_splits(), strict=True):
        assert (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8") == make_data.to_jsonl(rows)


def test_the_script_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    assert (tmp_path / "train.jsonl").read_bytes() == (FOLDER / "train.jsonl").read_bytes()
    assert (tmp_path / "validation.jsonl").read_bytes() == (FOLDER / "validation.jsonl").read_bytes()


def test_counts_and_balance() -> None:
    for split, least in (("train", 480), ("validation", 120)):
        counts = Counter(queues(read(split)))
        assert sum(counts.values()) >= least
        assert 8 <= len(counts) <= 10
        assert len(set(counts.values())) == 1


def test_every_row_lists_the_queues_and_names_one() -> None:
    for row in read("train") + read("validation"):
        system, user, assistant = row["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert assistant["content"] in re.findall(r"\w+", system["content"])
        assert len(words(user["content"])) >= 2


def test_no_text_twice_and_none_nearly_in_both_splits() -> None:
    train, validation = asked(read("train")), asked(read("validation"))
    assert len(set(train + validation)) == len(train + validation)
    known = [words(text) for text in train]
    assert max(alike(one, words(text)) for one, text in product(known, validation)) < MOST_ALIKE


def test_handwritten_messages_are_all_different() -> None:
    sources = make_data.read_sources()
    written = [words(text) for texts in sources.messages.values() for text in texts]
    assert len(written) == 600
    assert max(alike(one, other) for one, other in combinations(written, 2)) < 0.75


def test_splits_share_neither_message_nor_closing() -> None:
    sources = make_data.read_sources()
    written = {text for kind in (sources.messages, sources.closings) for texts in kind.values() for text in texts}
    train, validation = (written & parts(asked(read(split))) for split in ("train", "validation"))
    assert len(train) > 480 and len(validation) > 120
    assert not train & validation


def parts(texts: list[str]) -> set[str]:
    """Every run of whole sentences of every text."""
    found = set()
    for text in texts:
        sentences = re.split(r"(?<=[.?!]) ", text)
        ends = range(1, len(sentences) + 1)
        found |= {" ".join(sentences[start:end]) for end in ends for start in range(end)}
    return found


def test_no_row_brushes_its_own_queue_aside() -> None:
    asides = make_data.read_sources().asides
    for row in read("train") + read("validation"):
        own = asides[row["messages"][2]["content"]]
        assert not any(row["messages"][1]["content"].startswith(aside) for aside in own)


@pytest.mark.parametrize(
    "model",
    [
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=2000)),
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=2000)),
        make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000)),
        make_pipeline(CountVectorizer(), MultinomialNB()),
    ],
    ids=["tfidf", "tfidf-sharp", "counts", "bayes"],
)
def test_counting_words_is_not_enough(model: Any) -> None:
    train, validation = read("train"), read("validation")
    accuracy = model.fit(asked(train), queues(train)).score(asked(validation), queues(validation))
    assert 0.125 < accuracy < 0.80
