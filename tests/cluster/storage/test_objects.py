from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import Conflict, NotFound
from cluster.storage.objects import CHUNK_BYTES, ObjectStore, folder_sha256

LARGE = bytes(range(256)) * (CHUNK_BYTES // 256 * 2) + b"rest"


@pytest.fixture(params=["folder", "uri"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    folder = tmp_path / "objects"
    if request.param == "folder":
        return ObjectStore(str(folder))
    folder.mkdir()
    return ObjectStore(folder.as_uri())


@pytest.mark.parametrize("data", [b"", b"short", LARGE], ids=["empty", "short", "many chunks"])
def test_what_is_put_can_be_read(store: ObjectStore, data: bytes) -> None:
    sha256 = store.put_bytes("a/b/c", data)
    assert sha256 == hashlib.sha256(data).hexdigest()
    assert store.read_bytes("a/b/c") == data
    assert store.size("a/b/c") == len(data)


def test_a_stream_and_a_file_give_the_same_hash(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(LARGE)
    assert store.put_file("one", file) == store.put_stream("two", io.BytesIO(LARGE)) == store.put_bytes("three", LARGE)


def test_an_object_is_replaced_whole(store: ObjectStore) -> None:
    store.put_bytes("key", b"the first one, longer")
    store.put_bytes("key", b"second")
    assert store.read_bytes("key") == b"second"


def test_an_unfinished_object_does_not_appear_and_the_old_one_stays(store: ObjectStore) -> None:
    store.put_bytes("a/key", b"old")
    with pytest.raises(RuntimeError, match="cut off"), store.writer("a/key") as sink:
        sink.write(b"half of the ne")
        assert store.keys("a") == ["a/key"]
        raise RuntimeError("cut off")
    assert store.read_bytes("a/key") == b"old"
    assert store.keys("") == ["a/key"]


def test_an_unfinished_object_leaves_nothing_on_disk(tmp_path: Path) -> None:
    store = ObjectStore(str(tmp_path))
    with pytest.raises(RuntimeError), store.writer("key") as sink:
        sink.write(b"x")
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == []


def test_what_is_not_there_is_not_found(store: ObjectStore, tmp_path: Path) -> None:
    for look in (store.read_bytes, store.size, lambda key: store.get_file(key, tmp_path / "out")):
        with pytest.raises(NotFound) as caught:
            look("none")
        assert caught.value.code == "object_missing"
    assert not store.exists("none")
    assert store.keys("none") == []
    assert list(tmp_path.glob("out*")) == []
    store.delete("none")
    store.delete_prefix("none")


def test_a_file_is_fetched_checked_and_readable_by_others(store: ObjectStore, tmp_path: Path) -> None:
    sha256 = store.put_bytes("key", LARGE)
    out = tmp_path / "below" / "out"
    store.get_file("key", out, sha256)
    assert out.read_bytes() == LARGE
    assert out.stat().st_mode & 0o777 == 0o644


def test_other_content_than_recorded_is_refused_and_the_old_file_stays(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("key", b"new")
    out = tmp_path / "dir" / "out"
    out.parent.mkdir()
    out.write_bytes(b"old")
    with pytest.raises(Conflict) as caught:
        store.get_file("key", out, hashlib.sha256(b"other").hexdigest())
    assert caught.value.code == "object_damaged"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.read_bytes() == b"old"


def test_keys_are_listed_below_a_folder_only(store: ObjectStore) -> None:
    for key in ("t/a/2", "t/a/1", "t/ab/3", "u/1"):
        store.put_bytes(key, b"")
    assert store.keys("t/a") == ["t/a/1", "t/a/2"]
    assert store.keys("") == ["t/a/1", "t/a/2", "t/ab/3", "u/1"]


def test_deleting_takes_one_object_or_a_folder_and_no_neighbour(store: ObjectStore) -> None:
    for key in ("t/a/1", "t/a/2", "t/ab/3"):
        store.put_bytes(key, b"")
    store.delete("t/a/1")
    assert store.keys("t") == ["t/a/2", "t/ab/3"]
    store.delete_prefix("t/a")
    assert store.keys("t") == ["t/ab/3"]


def test_a_folder_goes_in_and_comes_out_without_links(store: ObjectStore, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_bytes(b"1")
    (source / "top").write_bytes(b"2")
    (source / "link").symlink_to("/etc/passwd")
    files = store.put_folder("m/1", source)
    assert files == {"sub/file": hashlib.sha256(b"1").hexdigest(), "top": hashlib.sha256(b"2").hexdigest()}
    store.get_folder("m/1", copy, files)
    assert {path.name: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {"file": b"1", "top": b"2"}


@pytest.mark.parametrize("key", ["../out", "a/../../out", "/etc/passwd"])
def test_keys_cannot_leave_the_store(store: ObjectStore, key: str) -> None:
    for use in (store.read_bytes, store.exists, store.keys, store.delete, lambda key: store.put_bytes(key, b"")):
        with pytest.raises(ValueError, match="not an object key"):
            use(key)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text("0123456789abcdef", min_size=64, max_size=64)))
def test_the_hash_of_a_folder_is_of_its_content_not_its_order(files: dict[str, str]) -> None:
    assert folder_sha256(dict(reversed(files.items()))) == folder_sha256(files)


def test_the_hash_of_a_folder_changes_with_names_and_contents() -> None:
    hashes = [folder_sha256(files) for files in ({}, {"a": "1"}, {"b": "1"}, {"a": "2"}, {"a": "1", "b": "1"})]
    assert len(set(hashes)) == len(hashes)


def test_an_object_is_on_the_disk_before_it_has_its_name(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row names it after that, and must not outlive it in a power cut."""
    real, named = os.fsync, []

    def seen(fd: int) -> None:
        named.append(store.exists("a/b"))
        real(fd)

    monkeypatch.setattr(os, "fsync", seen)
    store.put_bytes("a/b", b"x")
    assert named == [False, True]  # the file, then the folder
