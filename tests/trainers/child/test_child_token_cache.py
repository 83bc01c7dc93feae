"""Rows as tokens are made once, and what is found is what would be made."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from builders_child import make_config
from builders_llama import make_tokenizer

from trainers.child import token_cache
from trainers.child.data import Example, encode_row, encode_rows
from trainers.child.labels import encode_texts
from trainers.child.token_cache import TokenCache, fingerprint, read, write

ROWS = [
    {"messages": [{"role": "user", "content": f"capital {n}"}, {"role": "assistant", "content": "paris " * (n % 5)}]}
    for n in range(40)
]
TEXTS = [{"text": "rome"}, {"prompt": "italy", "completion": "rome"}, {"text": "spain madrid"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were tokenised, by call."""
    counts: list[int] = []

    def counted(rows: Any, tokenizer: Any) -> list[Example]:
        counts.append(len(rows))
        return encode_rows(rows, tokenizer)

    monkeypatch.setattr(token_cache, "encode_rows", counted)
    return counts


@pytest.mark.parametrize("rows", [ROWS, TEXTS, [*ROWS, *TEXTS], []])
def test_together_they_are_what_they_are_one_by_one(rows: list[dict[str, Any]], tokenizer: Any) -> None:
    assert encode_rows(rows, tokenizer) == [encode_row(row, tokenizer) for row in rows]


class Counting:
    """A tokenizer that counts how often it is asked for tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*texts, **options)


def test_rows_of_every_kind_share_a_few_calls(tokenizer: Any) -> None:
    """One call is what the tokenizer shares among its threads."""
    counting = Counting(tokenizer)
    rows = [*ROWS, *TEXTS * 20]
    assert encode_rows(rows, counting) == encode_rows(rows, tokenizer)
    assert counting.calls <= 5
    labelled = Counting(tokenizer)
    assert [one.ids for one in encode_texts(rows[40:41] * 30, labelled)] == [tokenizer("rome")["input_ids"]] * 30
    assert labelled.calls == 1


def test_a_rank_tokenises_with_the_threads_of_its_slot(tokenizer: Any, tmp_path: Path) -> None:
    """Forked as ranks are, from a process that has asked no tokenizer."""
    tokenizer.save_pretrained(tmp_path)
    script = f"""
import os
from trainers.child import launcher
from trainers.child.data import encode_rows
from trainers.child.model import load_tokenizer
from trainers.child.rank import make_deterministic
from trainers.config import TrainConfig
os.environ.update(launcher.ENVIRONMENT)
process = os.fork()
if process:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
make_deterministic(TrainConfig("base", "rows", "out", threads_per_slot=3))
tokenizer, _ = load_tokenizer({str(tmp_path)!r})
before = len(os.listdir("/proc/self/task"))
encode_rows([dict(text="rome")] * 50, tokenizer)
print(len(os.listdir("/proc/self/task")) - before, flush=True)
os._exit(0)
"""
    root = str(Path(__file__).parents[3])
    free = {name: value for name, value in os.environ.items() if not name.startswith(("TOKENIZERS_", "RAYON_"))}
    run = subprocess.run(
        [sys.executable, "-c", script], env={**free, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr


@pytest.mark.parametrize("rows", [ROWS, TEXTS, []])
def test_the_second_time_they_are_found(
    tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any, made: list[int]
) -> None:
    cache = TokenCache(tmp_path / "new" / "t1")
    first = cache.encode(rows, tokenizer)
    calls = len(made)
    assert cache.encode(rows, tokenizer) == first == [encode_row(row, tokenizer) for row in rows]
    assert len(made) == calls


def test_without_a_folder_nothing_is_kept(tokenizer: Any, made: list[int]) -> None:
    for _ in range(2):
        TokenCache(None).encode(ROWS, tokenizer)
    assert made == [40, 40]


def test_a_long_pass_says_how_far_it_is(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "CHUNK_ROWS", 15)
    heard: list[tuple[int, int]] = []
    TokenCache(tmp_path).encode(ROWS, tokenizer, lambda done, total: heard.append((done, total)))
    assert heard == [(15, 40), (30, 40), (40, 40)]


def test_other_rows_another_tokenizer_or_template_are_other_tokens(tokenizer: Any) -> None:
    other = make_tokenizer("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    longer = make_tokenizer()
    longer.add_tokens(["capital"])
    prints = [fingerprint(rows, one) for rows, one in ((ROWS, tokenizer), (ROWS[:-1], tokenizer), (ROWS, other))]
    assert len({*prints, fingerprint(ROWS, longer)}) == 4
    assert fingerprint(ROWS, make_tokenizer()) == prints[0]


def test_what_another_encoder_makes_is_not_found(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "rome"}]
    cache = TokenCache(tmp_path)
    assert cache.encode(rows, tokenizer) != cache.encode(rows, tokenizer, encoder=encode_texts)
    assert cache.encode(rows, tokenizer, encoder=encode_texts) == encode_texts(rows, tokenizer)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_a_file_that_was_cut_is_made_again(tmp_path: Path, tokenizer: Any, made: list[int], keep: int) -> None:
    cache = TokenCache(tmp_path)
    whole = cache.encode(ROWS, tokenizer)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert cache.encode(ROWS, tokenizer) == whole
    assert read(file) == whole
    assert made == [40, 40]


def test_a_byte_that_changed_is_noticed(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "tokens.npz"
    examples = encode_rows(ROWS, tokenizer)
    write(file, examples)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert read(file) in (None, examples)
    assert read(tmp_path / "not-there.npz") is None


def test_the_folder_stays_small_and_keeps_what_was_used_last(tmp_path: Path, tokenizer: Any) -> None:
    sets = [ROWS[:20], ROWS[1:21], ROWS[2:22]]
    TokenCache(tmp_path).encode(sets[0], tokenizer)
    [first] = tmp_path.iterdir()
    cache = TokenCache(tmp_path, max_bytes=int(2.5 * first.stat().st_size))
    cache.encode(sets[1], tokenizer)
    (tmp_path / ".killed.npz.1").write_bytes(first.read_bytes())
    for age, name in enumerate(sorted(tmp_path.iterdir(), key=lambda file: file != first)):
        os.utime(name, (1_000_000 - age, 1_000_000 - age))
    cache.encode(sets[0], tokenizer)  # used again
    cache.encode(sets[2], tokenizer)
    left = {file.name for file in tmp_path.iterdir()}
    assert left == {f"{fingerprint(rows, tokenizer)}.npz" for rows in (sets[0], sets[2])}


def test_one_rank_keeps_them_for_all(tmp_path: Path, tokenizer: Any, made: list[int]) -> None:
    first, second = (
        TokenCache.of(make_config(tmp_path, tmp_path, tmp_path, cache_dir=str(tmp_path)), rank) for rank in (0, 1)
    )
    expected = second.encode(ROWS, tokenizer)
    assert list(tmp_path.iterdir()) == []
    assert first.encode(ROWS, tokenizer) == second.encode(ROWS, tokenizer) == expected
    assert made == [40, 40]


def test_what_would_not_stay_is_not_written(tmp_path: Path, tokenizer: Any) -> None:
    TokenCache(tmp_path, max_bytes=100).encode(ROWS, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_renders_the_date_is_asked_each_time(tmp_path: Path, made: list[int]) -> None:
    template = "{{ strftime_now('%d') }} {% for message in messages %}{{ message['content'] }}{% endfor %}"
    for _ in range(2):
        TokenCache(tmp_path).encode(ROWS, make_tokenizer(template))
    assert (made, list(tmp_path.iterdir())) == ([40, 40], [])


def test_who_cannot_write_there_goes_on(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "file").touch()
    assert TokenCache(tmp_path / "file").encode(ROWS, tokenizer) == encode_rows(ROWS, tokenizer)


def test_many_at_a_time_do_not_meet(tmp_path: Path, tokenizer: Any) -> None:
    found: list[list[Example]] = []
    threads = [
        threading.Thread(target=lambda: found.append(TokenCache(tmp_path).encode(ROWS, tokenizer))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [encode_rows(ROWS, tokenizer)] * 4
    assert len(list(tmp_path.iterdir())) == 1
