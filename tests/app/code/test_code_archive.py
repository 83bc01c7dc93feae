"""Archives of code: good ones are taken whole, hostile ones not at all."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.code.archive import Limits, Unpacked, unpack
from cluster.errors import InvalidRequest

FEW = Limits(files=3, bytes=4 << 20, small_bytes=1 << 20)


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, packed: bool = True) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            header = tarfile.TarInfo(member[0])
            header.size = len(member[1])
            tar.addfile(header, io.BytesIO(member[1]))
    return gzip.compress(out.getvalue()) if packed else out.getvalue()


def zip_of(*members: tuple[str, bytes], mode: int = 0o100644) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def taken(data: bytes, folder: Path, limits: Limits = FEW) -> Unpacked:
    return unpack(io.BytesIO(data), folder, limits)


@pytest.mark.parametrize("pack", [tar_of, zip_of, lambda *members: tar_of(*members, packed=False)])
def test_a_good_archive(tmp_path: Path, pack: Callable[..., bytes]) -> None:
    made = taken(pack(("./train.py", b"print()"), ("pkg/__init__.py", b"")), tmp_path)
    assert list(made.files) == ["train.py", "pkg/__init__.py"] and made.bytes == 7
    assert made.files["train.py"][0].read_bytes() == b"print()"
    assert made.sha256["pkg/__init__.py"].startswith("e3b0c442")


def test_an_archive_of_a_folder_names_the_folder_too(tmp_path: Path) -> None:
    made = taken(tar_of(special(".", tarfile.DIRTYPE), special("a", tarfile.DIRTYPE), ("a/b.py", b"")), tmp_path)
    assert list(made.files) == ["a/b.py"]


BOMB = bytes(8 << 20)
HOSTILE = {
    "absolute": tar_of(("/etc/passwd", b"x")),
    "parent": tar_of(("a/../../x", b"x")),
    "parent folder": tar_of(special("../x", tarfile.DIRTYPE), ("a", b"")),
    "symbolic link": tar_of(special("x", tarfile.SYMTYPE, "/etc/passwd")),
    "link inside": tar_of(("a", b""), special("x", tarfile.SYMTYPE, "a")),
    "hard link": tar_of(("a", b""), special("x", tarfile.LNKTYPE, "a")),
    "device": tar_of(special("x", tarfile.CHRTYPE)),
    "pipe": tar_of(special("x", tarfile.FIFOTYPE)),
    "sparse": tar_of(special("x", tarfile.GNUTYPE_SPARSE)),
    "twice": tar_of(("a", b"1"), ("./a", b"2")),
    "file and folder": tar_of(("a", b"1"), ("a/b", b"2")),
    "too many": tar_of(*((str(n), b"") for n in range(4))),
    "bomb": tar_of(("a", BOMB)),
    "ratio": tar_of(("a", BOMB[: 2 << 20])),
    "control character": tar_of(("a\x1b[2J", b"")),
    "long name": tar_of(("a" * 300, b"")),
    "nothing": tar_of(special("a", tarfile.DIRTYPE)),
    "cut": tar_of(("a", bytes(100_000)))[:-30],
    "no archive": b"print('hello')\n" * 100,
    "empty": b"",
    "zip absolute": zip_of(("/etc/passwd", b"x")),
    "zip parent": zip_of(("../x", b"x")),
    "zip backslash": zip_of(("..\\x", b"x")),
    "zip link": zip_of(("x", b"/etc/passwd"), mode=0o120777),
    "zip device": zip_of(("x", b""), mode=0o020666),
    "zip bomb": zip_of(("a", BOMB)),
    "zip ratio": zip_of(("a", BOMB[: 2 << 20])),
    "zip too many": zip_of(*((str(n), b"") for n in range(4))),
    "zip cut": zip_of(("a", b"x"))[:-10],
    "zip damaged": zip_of(("a", b"x" * 50)).replace(b"K", b"L", 3),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        taken(HOSTILE[what], tmp_path)
    assert caught.value.code == "archive_refused" and caught.value.hint


def test_a_zip_that_lies_about_sizes_is_counted_as_it_is_read(tmp_path: Path) -> None:
    data = bytearray(zip_of(("a", BOMB)))
    for sign, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<L", data, data.find(sign) + offset, 10)
    with pytest.raises(InvalidRequest):
        taken(bytes(data), tmp_path)


def test_a_list_of_contents_is_not_read_when_it_is_too_large(tmp_path: Path) -> None:
    data = zip_of(*((f"{n}", b"") for n in range(3)))
    with pytest.raises(InvalidRequest, match="list of contents"):
        taken(data, tmp_path, replace(FEW, directory_bytes=100))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header = special("x", kind)
    header.size = 1 << 33
    with pytest.raises(InvalidRequest, match="header"):
        taken(
            gzip.compress(header.tobuf(tarfile.USTAR_FORMAT if header.size < 8**11 else tarfile.GNU_FORMAT)), tmp_path
        )
