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
ASIDE_SHARE = 0.75
"""Share of the messages that get a sentence about another queue's subject."""

ASIDE_PREFIX = "aside "

Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Sources:
    """Hand-written texts by queue, in the order of the file."""

    messages: dict[str, list[str]]
    asides: dict[str, list[str]]


def read_sources(path: Path = HERE / "messages.txt") -> Sources:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    asides = {name.removeprefix(ASIDE_PREFIX): texts for name, texts in sections.items() if name.startswith(ASIDE_PREFIX)}
    return Sources({name: texts for name, texts in sections.items() if not name.startswith(ASIDE_PREFIX)}, asides)


def with_aside(message: str, queue: str, asides: dict[str, list[str]], rng: random.Random) -> str:
    """The message, in ASIDE_SHARE of the cases with a sentence before or after it that mentions another queue's subject."""
    if rng.random() >= ASIDE_SHARE:
        return message
    aside = rng.choice(asides[rng.choice([name for name in asides if name != queue])])
    return f"{aside} {message}" if rng.random() < 0.5 else f"{message} {aside}"


def make_row(text: str, queue: str, queues: list[str]) -> Row:
    return {
        "messages": [
            {"role": "system", "content": f"Name the queue: {', '.join(queues)}."},
            {"role": "user", "content": text},
            {"role": "assistant", "content": queue},
        ]
    }


def make_splits(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """(train, validation). No hand-written message is in both."""
    rng = random.Random(seed)
    sources = read_sources()
    queues = list(sources.messages)
    train: list[Row] = []
    validation: list[Row] = []
    for queue, messages in sources.messages.items():
        for number, message in enumerate(rng.sample(messages, len(messages))):
            split = validation if number < VALIDATION_PER_QUEUE else train
            split.append(make_row(with_aside(message, queue, sources.asides, rng), queue, queues))
    rng.shuffle(train)
    rng.shuffle(validation)
    return train, validation


def to_jsonl(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    for name, rows in zip(("train", "validation"), make_splits(), strict=True):
        (HERE / f"{name}.jsonl").write_text(to_jsonl(rows), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
