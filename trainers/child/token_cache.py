"""Rows as tokens, made once: the next attempt, and the next run on the same rows with the same tokenizer, find them in a folder of
the tenant's own. What is found is what would be made, or it is made again."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from trainers.child import chat, data, render, spans
from trainers.child.control import Control
from trainers.child.data import IGNORED, Example, encode_rows
from trainers.child.render import Row
from trainers.config import TrainConfig

MAX_BYTES = 1 << 30
"""Of a tenant's folder; what was not used for longest goes first."""
CHUNK_ROWS = 1000
TOKEN_BYTES = 5
NOW = "strftime_now"
"""A template that says it renders the date: other tokens tomorrow."""

Progress = Callable[[int, int], None]
"""Told how many of how many rows are done."""
Encoder = Callable[[Sequence[Row], Any], list[Example]]
"""(rows, tokenizer) → the rows as tokens."""


def telling(control: Control, each: int = 1) -> Progress:
    """As the run's `progress` events. `each`: how many of what is encoded make a row of the file."""
    return lambda done, total: control.emit("progress", what="tokenising", done=done // each, total=total // each)


@dataclass(frozen=True)
class TokenCache:
    """`folder` None: nothing is kept. `keeps` False: only what others keep is found. Safe under concurrent use and SIGKILL: files
    get their names when they are whole."""

    folder: Path | None
    keeps: bool = True
    max_bytes: int = MAX_BYTES

    @classmethod
    def of(cls, config: TrainConfig, rank: int) -> TokenCache:
        """All ranks have the same rows: the first one of a node keeps them."""
        return cls(Path(config.cache_dir) if config.cache_dir else None, keeps=rank == config.first_rank)

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        progress: Progress | None = None,
        encoder: Encoder | None = None,
    ) -> list[Example]:
        """In the order of the rows. `encoder`: what makes them, by default `encode_rows`."""
        if self.folder is None or not getattr(tokenizer, "is_fast", False) or NOW in str(tokenizer.chat_template):
            return _encode(rows, tokenizer, progress, encoder)
        file = self.folder / f"{fingerprint(rows, tokenizer, encoder)}.npz"
        found = read(file)
        if found is None:
            found = _encode(rows, tokenizer, progress, encoder)
            self._keep(file, found)
        return found

    def _keep(self, file: Path, examples: Sequence[Example]) -> None:
        """Where the disk is full or the folder may not be written to, it is made again the next time."""
        if not self.keeps or sum(len(one.ids) for one in examples) * TOKEN_BYTES > self.max_bytes:
            return
        aside = file.with_name(f".{file.name}.{secrets.token_hex(6)}")  # sandboxes have the same process numbers
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write(aside, examples)
            aside.replace(file)
            self._stay_small(file)
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink()

    def _stay_small(self, newest: Path) -> None:
        """Also what a killed process left aside goes so."""
        files = sorted(newest.parent.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
        room = self.max_bytes
        for file in files:
            room -= file.stat().st_size
            if room < 0:
                file.unlink(missing_ok=True)


def _encode(rows: Sequence[Row], tokenizer: Any, progress: Progress | None, encoder: Encoder | None) -> list[Example]:
    examples: list[Example] = []
    while len(examples) < len(rows):
        examples += (encoder or encode_rows)(rows[len(examples) : len(examples) + CHUNK_ROWS], tokenizer)
        if progress is not None:
            progress(len(examples), len(rows))
    return examples


def fingerprint(rows: Sequence[Row], tokenizer: Any, encoder: Encoder | None = None) -> str:
    """Of all that the tokens follow from: the rows, the tokenizer with its template, and the code."""
    digest = hashlib.sha256()
    names = (transformers.__version__, tokenizers.__version__, type(tokenizer).__name__)
    marks = (tokenizer.chat_template, tokenizer.special_tokens_map)
    digest.update(json.dumps([names, marks, tokenizer.backend_tokenizer.to_str()], default=str).encode())
    for module in (data, render, chat, spans):
        digest.update(Path(str(module.__file__)).read_bytes())
    if encoder is not None:
        digest.update(inspect.getsource(encoder).encode())
    for row in rows:
        digest.update(json.dumps(row, separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def write(path: Path, examples: Sequence[Example]) -> None:
    """`ends` [rows] of each row's tokens; `ids` and `learned` (whether it carries loss) [tokens]."""
    ids = np.array([token for example in examples for token in example.ids], dtype=np.int32)
    labels = np.array([label for example in examples for label in example.labels], dtype=np.int64)
    ends = np.cumsum([len(example.ids) for example in examples], dtype=np.int64)
    with path.open("wb") as file:
        np.savez(file, ends=ends, ids=ids, learned=labels != IGNORED)


def read(path: Path) -> list[Example] | None:
    """None: it is not there, or damaged (the archive holds checksums)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            ends, ids, learned = stored["ends"], stored["ids"], stored["learned"]
        os.utime(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if ids.shape != learned.shape or (ends[-1] if len(ends) else 0) != len(ids):
        return None
    plain = ids.tolist()
    labels = [
        token if learn else IGNORED for token, learn in zip(plain, learned.tolist(), strict=True)
    ]  # shared: half the memory
    return [Example(plain[start:end], labels[start:end]) for start, end in pairwise([0, *ends.tolist()])]
