"""Downloads from a real server that dies in the middle, lies, or knows no ranges: what has arrived is kept, and believed only when
its hash is right."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from builders_channel import ChannelServer, conda_yml

from runtime_envs.budget import prune
from runtime_envs.conda import fetch_process
from runtime_envs.conda.engine import FETCH, ask
from runtime_envs.conda.solve import CondaPlaces
from runtime_envs.environments import Environments, solve_environment
from runtime_envs.errors import CHANNEL_FAILED, EnvironmentProblem

pytestmark = pytest.mark.integration
PIECE = 1_000_000


@pytest.fixture
def flaky(channel: ChannelServer) -> Iterator[ChannelServer]:
    """Python, 12 MB, breaks off after each megabyte, when it is broken."""
    channel.behave()
    channel.breaks_after = PIECE
    yield channel
    channel.behave()


@pytest.fixture
def python(channel_folder: Path) -> Path:
    return next(channel_folder.glob("linux-64/python-*.conda"))


class Node:
    """A package cache that nothing is linked from."""

    def __init__(self, root: Path, server: ChannelServer) -> None:
        self.root, self.server = root, server
        self.said: list[dict[str, Any]] = []
        (root / "pkgs").mkdir()

    def fetch(self, package: Path, sha256: str = "") -> Path:
        """Where it lies now."""
        digest = sha256 or hashlib.sha256(package.read_bytes()).hexdigest()
        url = f"{self.server.url}/{package.parent.name}/{package.name}"
        wanted = {"url": url, "sha256": digest, "size": package.stat().st_size, "place": package.stem}
        question = {"packages": [wanted], "downloads": str(self.root / "downloads"), "cache": str(self.root / "pkgs")}
        ask(question, script=FETCH, progress=self.said.append)
        return self.root / "pkgs" / package.stem

    @property
    def kept(self) -> list[Path]:
        return [path for path in (self.root / "downloads").glob("*/*") if path.is_file()]

    def whole(self, package: Path) -> bool:
        place = self.root / "pkgs" / package.stem
        return (place / "info" / "index.json").is_file() and (place / "bin" / "python3.11").is_file() and not self.kept


@pytest.fixture
def bare(tmp_path: Path, flaky: ChannelServer) -> Node:
    return Node(tmp_path, flaky)


def starts(server: ChannelServer) -> list[int]:
    return [start for _, start, _ in server.sent]


def test_it_goes_on_where_it_broke_off(bare: Node, python: Path) -> None:
    bare.server.broken.add("python-")
    bare.server.breaks = 3
    bare.fetch(python)
    assert bare.whole(python)
    assert starts(bare.server) == [0, PIECE, 2 * PIECE, 3 * PIECE]
    assert sum(count for _, _, count in bare.server.sent) == python.stat().st_size


def test_the_next_attempt_goes_on_too(node: Environments, places: CondaPlaces, flaky: ChannelServer) -> None:
    lock = solve_environment(conda_yml("greeter"), places).lock
    flaky.broken.add("python-")
    flaky.ranges = False
    with pytest.raises(EnvironmentProblem, match=rf"python-.*\({PIECE} of \d+ bytes are here\)") as caught:
        node.materialize(lock)
    assert (caught.value.code, caught.value.fixable_by) == (CHANNEL_FAILED, "operator")
    flaky.behave()
    made = node.materialize(lock)
    assert [start for path, start, _ in flaky.sent if "/python-" in path] == [PIECE]
    assert node.verify(made.fingerprint, full=True) == []
    flaky.log.clear()
    node.materialize(solve_environment(conda_yml("polite"), places).lock)
    assert sorted(path.split("/")[-1].split("-")[0] for path in flaky.log if path.endswith(".conda")) == [
        "greeter",
        "polite",
    ]


def broken_off(bare: Node, python: Path) -> Path:
    """What is kept of it."""
    bare.server.broken.add("python-")
    bare.server.ranges = False
    with pytest.raises(EnvironmentProblem, match="bytes are here"):
        bare.fetch(python)
    bare.server.behave()
    (kept,) = bare.kept
    assert kept.stat().st_size == PIECE
    return kept


def test_a_server_without_ranges_sends_all_again(bare: Node, python: Path) -> None:
    broken_off(bare, python)
    bare.server.ranges = False
    bare.fetch(python)
    assert bare.whole(python) and starts(bare.server) == [0]


@pytest.mark.parametrize("damage", [lambda data: b"\0" + data[1:], lambda data: data * 20], ids=["other", "too long"])
def test_what_is_kept_and_damaged_is_fetched_anew(bare: Node, python: Path, damage: Any) -> None:
    kept = broken_off(bare, python)
    kept.write_bytes(damage(kept.read_bytes()))
    bare.fetch(python)
    assert bare.whole(python) and starts(bare.server)[-1] == 0


def test_another_file_than_expected_is_not_opened(bare: Node, python: Path) -> None:
    bare.server.other.add("python-")
    with pytest.raises(EnvironmentProblem, match=r"python-.*another file than the lock says") as caught:
        bare.fetch(python)
    assert caught.value.code == CHANNEL_FAILED
    assert bare.kept == [] and not (bare.root / "pkgs" / python.stem).exists()


def test_a_larger_file_is_not_taken_whole(bare: Node, python: Path, channel_folder: Path, tmp_path: Path) -> None:
    small = tmp_path / python.parent.name / python.name
    small.parent.mkdir()
    small.write_bytes(python.read_bytes()[:PIECE])
    with pytest.raises(EnvironmentProblem, match="another file than the lock says"):
        bare.fetch(small)
    assert bare.kept == []


def test_what_is_not_there_is_not_asked_for_again(bare: Node, tmp_path: Path) -> None:
    absent = tmp_path / "noarch" / "absent-1.0-py_0.conda"
    absent.parent.mkdir()
    absent.write_bytes(b"nothing")
    with pytest.raises(EnvironmentProblem, match="404"):
        bare.fetch(absent)


def test_progress_while_bytes_arrive(bare: Node, python: Path) -> None:
    bare.server.broken.add("python-")
    bare.server.breaks_after, bare.server.breaks = 9 * 1024 * 1024, 1
    bare.fetch(python)
    total = python.stat().st_size
    assert all(said["stage"] == "download" and said["total"] == total for said in bare.said)
    said = [one["bytes"] for one in bare.said]
    assert said == sorted(said) and len(said) > 1 and said[-1] == total


def test_two_who_want_it_fetch_it_once(bare: Node, python: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: bare.fetch(python), range(4)))
    assert bare.whole(python) and starts(bare.server) == [0]


def test_a_folder_may_be_gone_at_any_moment(tmp_path: Path) -> None:
    """Who has finished removes it, while others make it and wait for its lock."""
    file = tmp_path / "downloads" / "digest" / "package"

    def come_and_go(_: int) -> None:
        for _ in range(300):
            with os.fdopen(fetch_process.alone(file), "rb"):
                fetch_process.discard(file.parent)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not file.parent.exists()


def a_file(at: Path) -> None:
    at.touch()


def a_link_to_nothing(at: Path) -> None:
    at.symlink_to("unmounted/disk")


@pytest.mark.parametrize(
    ("made", "where"),
    [
        *((a_file, where) for where in ("downloads", "downloads/digest")),
        *((a_link_to_nothing, where) for where in ("downloads", "downloads/digest", "downloads/digest/package")),
    ],
)
def test_what_is_in_a_folder_s_place_for_good_is_an_error(tmp_path: Path, made: Any, where: str) -> None:
    place = tmp_path / where
    place.parent.mkdir(parents=True, exist_ok=True)
    made(place)
    with pytest.raises(OSError, match="downloads"):
        fetch_process.alone(tmp_path / "downloads" / "digest" / "package")


def test_pruning_takes_what_arrived_in_part(bare: Node, python: Path) -> None:
    broken_off(bare, python)
    prune(bare.root)
    assert bare.kept == []
    bare.fetch(python)
    assert bare.whole(python) and starts(bare.server) == [0]


def test_killed_while_it_unpacks(bare: Node, python: Path) -> None:
    """What is left of it is not taken for a package, nor in the way of the next."""
    kept = broken_off(bare, python)
    kept.write_bytes(python.read_bytes())
    (kept.parent / "unpacked" / "info").mkdir(parents=True)
    (kept.parent / "unpacked" / "info" / "half").write_text("")
    bare.fetch(python)
    assert bare.whole(python) and bare.server.sent == []
    assert not (bare.root / "pkgs" / python.stem / "info" / "half").exists()
