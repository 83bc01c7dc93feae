"""The entry point of a script, as text and as words."""

from __future__ import annotations

import pytest

from app.services.scripts import entrypoint_of
from cluster.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.py", ["train.py"]),
        (
            "./src/train.py --name 'two words' $HOME `ls` ; rm",
            ["src/train.py", "--name", "two words", "$HOME", "`ls`", ";", "rm"],
        ),
        ("-m package.train --lr 1e-4", ["-m", "package.train", "--lr", "1e-4"]),
    ],
)
def test_it_is_split_and_no_shell_sees_it(text: str, words: list[str]) -> None:
    assert entrypoint_of(text) == words


@pytest.mark.parametrize("text", ["", " ", "a.py " * 300, "train.sh", "-m", "-m a/b", "-c 'x'", "~/x.py/..", "'a.py"])
def test_what_cannot_be_started(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        entrypoint_of(text)
    assert (caught.value.code, caught.value.param) == ("invalid_entrypoint", "entrypoint")
