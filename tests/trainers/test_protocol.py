"""The conversation between worker and child: whole messages, end of file, limits; and the configuration it carries."""

from __future__ import annotations

import threading

import pytest

from trainers.config import Hyperparams, TrainConfig
from trainers.protocol import MAX_MESSAGE_BYTES, pair


def test_messages_arrive_whole_and_in_order() -> None:
    ours, theirs = pair()
    for step in range(50):
        ours.send("step", step=step, text="ä\n{")
    assert [theirs.receive(60) for _ in range(50)] == [{"type": "step", "step": i, "text": "ä\n{"} for i in range(50)]
    ours.close()
    theirs.close()


def test_several_threads_may_send() -> None:
    ours, theirs = pair()
    threads = [threading.Thread(target=lambda n=n: [ours.send("log", n=n) for _ in range(100)]) for n in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    got = [(theirs.receive(60) or {})["n"] for _ in range(400)]
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted([0, 1, 2, 3] * 100)
    ours.close()
    theirs.close()


def test_end_of_file_is_none() -> None:
    ours, theirs = pair()
    ours.send("ping")
    ours.close()
    assert theirs.receive(60) == {"type": "ping"}
    assert theirs.receive(60) is None
    theirs.close()


def test_a_message_without_reader_raises() -> None:
    ours, theirs = pair()
    theirs.close()
    with pytest.raises(BrokenPipeError):
        ours.send("ping")
    ours.close()


def test_silence_is_a_timeout() -> None:
    ours, theirs = pair()
    with pytest.raises(TimeoutError):
        theirs.receive(0.01)
    ours.close()
    theirs.close()


def test_the_largest_message_passes_and_a_larger_one_is_refused() -> None:
    ours, theirs = pair()
    room = MAX_MESSAGE_BYTES - len('{"type":"log","message":""}')
    ours.send("log", message="x" * room)
    assert len((theirs.receive(60) or {})["message"]) == room
    with pytest.raises(ValueError, match="bytes"):
        ours.send("log", message="x" * (room + 1))
    ours.close()
    theirs.close()


def test_the_configuration_survives_the_way() -> None:
    config = TrainConfig(
        "base", "train", "out", hyperparams=Hyperparams(lr=1e-3, target_modules=["q_proj"]), world_size=2
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict({"base_model": "b", "train_file": "t", "output_dir": "o"}).hyperparams == Hyperparams()
    with pytest.raises(TypeError, match="speed"):
        TrainConfig.from_dict({**config.to_dict(), "speed": 1})
