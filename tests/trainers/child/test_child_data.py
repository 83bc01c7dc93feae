"""Which tokens carry loss, which rows are refused, and which rows a step sees."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from builders_child import make_config
from builders_llama import make_tokenizer, write_rows

from trainers.child.chat import CHATML
from trainers.child.data import IGNORED, Example, Plan, encode, encode_row, micro_batch_size, micro_batches
from trainers.child.failure import TrainFailure
from trainers.child.rows import read_data
from trainers.config import Hyperparams


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def learned(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of the tokens that carry loss."""
    return tokenizer.decode([label for label in encode_row(row, tokenizer).labels if label != IGNORED])


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_loss_on_every_assistant_turn_with_its_end(tokenizer: Any) -> None:
    row = {"messages": [turn("user", "a"), turn("assistant", "rome"), turn("user", "b"), turn("assistant", "paris")]}
    assert learned(row, tokenizer) == "rome<|im_end|>paris<|im_end|>"


def test_weight_zero_skips_a_turn(tokenizer: Any) -> None:
    row = {
        "messages": [
            turn("user", "a"),
            turn("assistant", "rome", weight=0),
            turn("user", "b"),
            turn("assistant", "paris"),
        ]
    }
    assert learned(row, tokenizer) == "paris<|im_end|>"


def test_a_turn_that_repeats_the_question_is_found_at_its_own_place(tokenizer: Any) -> None:
    row = {"messages": [turn("user", "paris"), turn("assistant", "paris")]}
    example = encode_row(row, tokenizer)
    assert learned(row, tokenizer) == "paris<|im_end|>"
    assert example.labels.index(example.ids[-2]) > len(example.ids) // 2 or example.labels[-3] != IGNORED


def test_a_template_that_rewrites_earlier_turns_still_finds_the_words() -> None:
    cutting = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ '<|im_start|>' + m.role + ' ' + m.content"
        " + '<|im_end|>' }}{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    )
    row = {"messages": [turn("user", "a"), turn("assistant", "rome"), turn("user", "b"), turn("assistant", "paris")]}
    text = learned(row, make_tokenizer(cutting))
    assert text.startswith("rome") and "paris" in text and "user" not in text


def test_loss_on_the_completion_and_the_end(tokenizer: Any) -> None:
    row = {"prompt": "what is the capital of italy ", "completion": "rome"}
    assert learned(row, tokenizer) == "rome<|im_end|>"
    ids = encode_row(row, tokenizer).ids
    assert ids[: len(prompt := tokenizer(row["prompt"])["input_ids"])] == prompt


def test_loss_on_all_of_a_text(tokenizer: Any) -> None:
    row = {"text": "rome is the capital of italy"}
    assert learned(row, tokenizer) == "rome is the capital of italy<|im_end|>"


def test_chatml_ends_a_turn_where_the_tokenizer_does_not_know_it() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.eos_token = "<|endoftext|>"
    row = {"messages": [turn("user", "a"), turn("assistant", "rome")]}
    assert learned(row, tokenizer) == "rome<|im_end|><|endoftext|>"


def rows_of(*words: int) -> list[dict[str, Any]]:
    return [{"text": "rome " * count} for count in words]


def test_max_seq_len_is_the_longest_row_and_at_most_the_context(tokenizer: Any) -> None:
    rows = rows_of(3, 30)
    longest = len(encode_row(rows[1], tokenizer).ids)
    assert encode(rows, tokenizer, Hyperparams(), 4096).max_seq_len == longest
    assert encode(rows, tokenizer, Hyperparams(), 8).max_seq_len == 8


def test_too_long_rows_are_cut_dropped_or_refused(tokenizer: Any) -> None:
    def encoded(overlength: str) -> list[Example]:
        return encode(rows_of(3, 30), tokenizer, Hyperparams(max_seq_len=10, overlength=overlength), None).examples

    assert [len(example.ids) for example in encoded("truncate")][1] == 10
    assert len(encoded("drop")) == 1
    with pytest.raises(TrainFailure) as caught:
        encoded("error")
    assert caught.value.code == "row_too_long" and "row 2" in caught.value.message


def test_a_row_without_loss_is_named_but_not_shown(tokenizer: Any) -> None:
    rows = [{"text": "rome"}, {"messages": [turn("user", "secret"), turn("assistant", "secret", weight=0)]}]
    with pytest.raises(TrainFailure) as caught:
        encode(rows, tokenizer, Hyperparams(), None)
    assert caught.value.code == "no_loss_tokens"
    assert "rows 2" in caught.value.message and "secret" not in caught.value.message


EMPTY = {"messages": [turn("user", "a"), turn("assistant", "a", weight=0)]}
LONG = {"text": "rome " * 40}
REFUSED = {"messages": [turn("assistant", "", tool_calls=[{"function": {"name": "f", "arguments": {}}}])]}


@pytest.mark.parametrize("bad", [EMPTY, LONG, REFUSED], ids=["no loss", "too long", "refused"])
@pytest.mark.parametrize("validated", [False, True])
def test_a_row_has_its_number_in_the_file(tokenizer: Any, tmp_path: Path, bad: dict[str, Any], validated: bool) -> None:
    """Whatever share is held out, whichever side it is on, and however rows are cut into chunks."""
    hyper = Hyperparams(validation_split=0.5, overlength="error", max_seq_len=20)
    rows = [{"text": f"rome {number}"} for number in range(30)]
    config = make_config(tmp_path, write_rows(tmp_path / "rows", rows), tmp_path, validation_split=0.5)
    side = [int(row["text"].split()[1]) for row in read_data(config)[validated]]
    place = side[-1]  # the last one: its place in the file is not its place on its side
    write_rows(tmp_path / "rows", [*rows[:place], bad, *rows[place + 1 :]])
    with pytest.raises(TrainFailure) as caught:
        encode(read_data(config)[validated], tokenizer, hyper, None)
    assert re.search(rf"\brows? {place + 1}\b", caught.value.message, re.IGNORECASE), caught.value.message
    assert place + 1 != len(side)


def test_no_rows_is_no_loss(tokenizer: Any) -> None:
    with pytest.raises(TrainFailure, match="no rows"):
        encode([], tokenizer, Hyperparams(), None)


def test_rows_that_lose_every_answer_by_truncation_are_counted(tokenizer: Any) -> None:
    long = {"messages": [turn("user", "rome " * 40), turn("assistant", "paris")]}
    short = {"messages": [turn("user", "a"), turn("assistant", "paris")]}
    encoded = encode([long, short], tokenizer, Hyperparams(max_seq_len=30), None)
    assert (len(encoded.examples), encoded.truncated, encoded.dropped) == (1, 1, 1)


def test_an_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    plan = Plan(10, Hyperparams(epochs=2, batch_size=4, seed=7))
    first = [row for step in (1, 2, 3) for row in plan.batch(step)]
    second = [row for step in (4, 5, 6) for row in plan.batch(step)]
    assert plan.steps == 6 and sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert plan.batch(5) == Plan(10, Hyperparams(epochs=2, batch_size=4, seed=7)).batch(5)
    assert plan.batch(1) != Plan(10, Hyperparams(epochs=2, batch_size=4, seed=8)).batch(1)


@pytest.mark.parametrize("scheduler, middle", [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_the_learning_rate_warms_up_and_falls(scheduler: str, middle: float) -> None:
    plan = Plan(100, Hyperparams(max_steps=110, lr=2.0, warmup_ratio=10 / 110, lr_scheduler=scheduler))
    assert plan.lr(1) == pytest.approx(0.2) and plan.lr(10) == 2.0 and plan.lr(11) == 2.0
    assert plan.lr(61) == pytest.approx(2.0 * middle)
    assert all(plan.lr(step) > 0 for step in range(1, 111))


def test_the_ranks_share_a_batch_in_equally_many_pieces() -> None:
    shares = [micro_batches([5, 6, 7], rank, 2, 1) for rank in (0, 1)]
    assert shares == [[[5], [7]], [[6], []]]


def test_the_micro_batch_is_as_large_as_memory_allows() -> None:
    assert micro_batch_size(Hyperparams(batch_size=8), 2, 50) == 4
    assert micro_batch_size(Hyperparams(batch_size=64), 1, 4096) == 4
    assert micro_batch_size(Hyperparams(batch_size=64), 1, 1 << 20) == 1
    assert micro_batch_size(Hyperparams(batch_size=8, micro_batch_size=2), 1, 50) == 2
    assert math.ceil(8 / 3) == micro_batch_size(Hyperparams(batch_size=8, micro_batch_size=99), 3, 50)
