"""Makes train.jsonl and validation.jsonl from the hand-written messages.txt: same seed, same bytes.

Each message asks for one thing; most also mention in passing what belongs to another queue, so that counting words is not
enough. Run it without arguments to write the two files beside it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 2026
VALIDATION_PER_QUEUE = 15
ASIDE_SHARE = 0.8
"""Share of the messages that open with a sentence about another queue's subject."""
CLOSING_SHARE = 0.8
"""Share of the messages that end by saying outright what they are about."""
VALIDATION_CLOSINGS = 4

Row = dict[str, list[dict[str, str]]]
Texts = dict[str, list[str]]


@dataclass(frozen=True)
class Sources:
    """Hand-written texts by queue, in the order of the file."""

    messages: Texts
    closings: Texts
    asides: Texts


def read_sources(path: Path = HERE / "messages.txt") -> Sources:
    kinds: dict[str, Texts] = {"message": {}, "closing": {}, "aside": {}}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            kind, _, queue = line.strip("[]").rpartition(" ")
            lines = kinds[kind or "message"].setdefault(queue, [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return Sources(kinds["message"], kinds["closing"], kinds["aside"])


def compose(message: str, closings: list[str], asides: list[str], rng: random.Random) -> str:
    parts = [message]
    if rng.random() < ASIDE_SHARE:
        parts.insert(0, rng.choice(asides))
    if rng.random() < CLOSING_SHARE:
        parts.append(rng.choice(closings))
    return " ".join(parts)


def make_row(text: str, queue: str, queues: list[str]) -> Row:
    return {
        "messages": [
            {"role": "system", "content": f"Name the queue: {', '.join(queues)}."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": queue},
        ]
    }


def split(texts: list[str], held_out: int, rng: random.Random) -> tuple[list[str], list[str]]:
    shuffled = rng.sample(texts, len(texts))
    return shuffled[held_out:], shuffled[:held_out]


def make_splits(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """(train, validation). No message and no closing is in both."""
    rng = random.Random(seed)
    sources = read_sources()
    queues = list(sources.messages)
    splits: tuple[list[Row], list[Row]] = ([], [])
    for queue in queues:
        asides = [text for other in queues if other != queue for text in sources.asides[other]]
        messages = split(sources.messages[queue], VALIDATION_PER_QUEUE, rng)
        closings = split(sources.closings[queue], VALIDATION_CLOSINGS, rng)
        for rows, own, ends in zip(splits, messages, closings, strict=True):
            rows.extend(make_row(compose(text, ends, asides, rng), queue, queues) for text in own)
    for rows in splits:
        rng.shuffle(rows)
    return splits


def to_jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    for name, rows in zip(("train", "validation"), make_splits(), strict=True):
        (HERE / f"{name}.jsonl").write_text(to_jsonl(rows), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
