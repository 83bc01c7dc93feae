"""Bundles as an enemy would write them: refused whole."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_envs.bundles.archive import HEAD, SIGNATURE, Head, Limits, Opened, read_archive, write_archive
from runtime_envs.bundles.signing import OWN, SigningKey, Trust
from runtime_envs.errors import BUNDLE_INVALID, BUNDLE_UNTRUSTED, EnvironmentProblem

FINGERPRINT = "0" * 64
LOCK, WHEEL = "lock.json", "wheels/a-1-py3-none-any.whl"
Member = tuple[str, bytes, dict[str, object]]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return SigningKey(tmp_path_factory.mktemp("keys") / "bundles.pem")


def trust(key: SigningKey, **others: str) -> Trust:
    return Trust(key.public(), others)


@pytest.fixture
def bundle(key: SigningKey, tmp_path: Path) -> Path:
    files = {LOCK: tmp_path / "lock", WHEEL: tmp_path / "wheel"}
    files[LOCK].write_text("{}")
    files[WHEEL].write_bytes(b"PK" * 1000)
    write_archive(tmp_path / "b.tar.gz", FINGERPRINT, files, key)
    return tmp_path / "b.tar.gz"


def members(bundle: Path) -> list[Member]:
    with tarfile.open(bundle) as archive:
        found = [(one.name, archive.extractfile(one)) for one in archive]
        return [(name, file.read(), {}) for name, file in found if file is not None]


def pack(target: Path, contents: list[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    with gzip.open(target, "wb") as out:
        for name, data, more in contents:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in more.items():
                setattr(info, attribute, value)
            out.write(info.tobuf(format) + data + b"\0" * (-len(data) % 512))
        out.write(b"\0" * 1024)
    return target


def read(path: Path, folder: Path, whom: Trust, limits: Limits | None = None) -> Opened:
    with path.open("rb") as source:
        return read_archive(source, folder, whom, limits)


def refusal(path: Path, key: SigningKey, limits: Limits | None = None) -> EnvironmentProblem:
    folder = path.parent / "out"
    with pytest.raises(EnvironmentProblem) as caught:
        read(path, folder, trust(key), limits)
    return caught.value


def test_round_trip(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    opened = read(bundle, tmp_path / "out", trust(key))
    assert (opened.signed_by, opened.head.fingerprint) == (OWN, FINGERPRINT)
    assert (tmp_path / "out" / WHEEL).read_bytes() == b"PK" * 1000
    assert [name for name, _, _ in members(bundle)] == [HEAD, SIGNATURE, LOCK, WHEEL]


def test_our_packing_by_the_standard_tools_is_read_too(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    assert read(pack(tmp_path / "again.tar.gz", members(bundle)), tmp_path / "out", trust(key)).folder.is_dir()


def test_another_deployments_key(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    other = SigningKey(tmp_path / "other.pem")
    with pytest.raises(EnvironmentProblem) as caught:
        read(bundle, tmp_path / "out", trust(other))
    assert caught.value.code == BUNDLE_UNTRUSTED and key.public() in caught.value.message
    assert not (tmp_path / "out").exists()
    assert read(bundle, tmp_path / "out", trust(other, site_a=key.public())).signed_by == "site_a"


def test_a_key_is_made_once_and_is_secret(tmp_path: Path) -> None:
    key = SigningKey(tmp_path / "keys" / "k.pem")
    assert key.public() == SigningKey(tmp_path / "keys" / "k.pem").public()
    assert key.file.stat().st_mode & 0o777 == 0o600 and list(key.file.parent.iterdir()) == [key.file]


def extra(name: str, **more: object) -> Callable[[list[Member]], list[Member]]:
    return lambda contents: [*contents, (name, b"", more)]


HOSTILE: dict[str, Callable[[list[Member]], list[Member]]] = {
    "an absolute path": extra("/etc/cron.d/evil"),
    "a path that climbs": extra("packages/../../evil"),
    "a symbolic link": extra("lock2.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a signed name as a link": lambda c: [
        *c[:2],
        (LOCK, b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        c[3],
    ],
    "a hard link": extra("wheels/b-1-py3-none-any.whl", type=tarfile.LNKTYPE, linkname=LOCK),
    "a device": extra("packages/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": extra("packages/pipe", type=tarfile.FIFOTYPE),
    "a folder": extra("packages", type=tarfile.DIRTYPE),
    "an extended header": extra("x", type=tarfile.XHDTYPE),
    "a sparse file": extra("x", type=tarfile.GNUTYPE_SPARSE),
    "a long name": extra("x", type=tarfile.GNUTYPE_LONGNAME),
    "what was not signed": extra("wheels/evil-1-py3-none-any.whl"),
    "a member twice": lambda c: [*c, c[2]],
    "a member missing": lambda c: c[:-1],
    "another content": lambda c: [*c[:3], (WHEEL, b"KP" * 1000, {})],
    "a shorter content": lambda c: [*c[:3], (WHEEL, b"PK" * 999, {})],
    "no signature": lambda c: [c[0], *c[2:]],
    "the manifest not first": lambda c: [c[1], c[0], *c[2:]],
    "another manifest": lambda c: [(HEAD, c[0][1].replace(b"0000", b"1111", 1), {}), *c[1:]],
    "a huge manifest": lambda c: [(HEAD, b" " * 5 * 1024**2 + c[0][1], {}), *c[1:]],
    "a signature that is none": lambda c: [c[0], (SIGNATURE, b'{"key": 3}', {}), *c[2:]],
    "nothing": lambda c: [],
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile(change: Callable[[list[Member]], list[Member]], bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    assert refusal(pack(tmp_path / "hostile.tar.gz", change(members(bundle))), key).code == BUNDLE_INVALID
    assert {path.name for path in tmp_path.iterdir()} <= {"lock", "wheel", "b.tar.gz", "hostile.tar.gz", "out"}


def signed(tmp_path: Path, key: SigningKey, files: dict[str, tuple[int, str]], contents: list[Member]) -> Path:
    """With a manifest that our own key has signed: even that is not enough."""
    head = {"fingerprint": FINGERPRINT, "files": {name: {"size": n, "sha256": h} for name, (n, h) in files.items()}}
    said = Head.model_validate(head).model_dump_json().encode()
    signature = json.dumps(vars(key.sign(said))).encode()
    return pack(tmp_path / "signed.tar.gz", [(HEAD, said, {}), (SIGNATURE, signature, {}), *contents])


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "wheels/../../x.whl", "wheels/.x.whl", "bin/sh", "lock.json/x", ""]
)
def test_a_signed_name_that_bundles_do_not_have(name: str, key: SigningKey, tmp_path: Path) -> None:
    path = signed(tmp_path, key, {name: (0, "0" * 64)}, [(name, b"", {})])
    assert refusal(path, key).code == BUNDLE_INVALID and not (tmp_path / "out").exists()


def test_bombs(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    bomb = signed(tmp_path, key, {LOCK: (10**9, "0" * 64)}, [(LOCK, b"\0" * 10**7, {})])
    assert "too many" in refusal(bomb, key).message
    assert not (tmp_path / "out").exists()
    assert "files" in refusal(bundle, key, Limits(files=1)).message
    assert "too many" in refusal(bundle, key, Limits(bytes_=1000)).message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(
    data: st.DataObject, key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the unpacked stream: of the packed one some bytes mean nothing (the time in gzip's header)."""
    folder = tmp_path_factory.mktemp("flip")
    (folder / "lock").write_text("{}")
    write_archive(folder / "b.tar.gz", FINGERPRINT, {LOCK: folder / "lock"}, key)
    stream = bytearray(gzip.decompress((folder / "b.tar.gz").read_bytes()))
    position = data.draw(st.integers(0, len(stream) - 1))
    before = stream[position]
    stream[position] = data.draw(st.integers(0, 255).filter(lambda value: value != before))
    (folder / "b.tar.gz").write_bytes(gzip.compress(bytes(stream)))
    try:
        opened = read(folder / "b.tar.gz", folder / "out", trust(key))
    except EnvironmentProblem:
        return
    # padding and the fields of a header that nothing is made from may differ; what comes out may not
    assert (opened.folder / LOCK).read_text() == "{}" and list((folder / "out").iterdir()) == [folder / "out" / LOCK]


@settings(max_examples=60, deadline=None)
@given(garbage=st.binary(max_size=3000), packed=st.booleans())
def test_garbage_is_refused(
    garbage: bytes, packed: bool, key: SigningKey, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("garbage") / "g"
    path.write_bytes(gzip.compress(garbage) if packed else garbage)
    assert refusal(path, key).code == BUNDLE_INVALID


def test_cut_off_anywhere(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    whole = bundle.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:length])
        with pytest.raises(EnvironmentProblem):
            read(tmp_path / "cut.tar.gz", tmp_path / f"out{length}", trust(key))


def test_what_follows_the_end(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    stream = io.BytesIO(gzip.decompress(bundle.read_bytes()) + b"x" * 512)
    (tmp_path / "more.tar.gz").write_bytes(gzip.compress(stream.read()))
    assert refusal(tmp_path / "more.tar.gz", key).code == BUNDLE_INVALID


def test_in_as_many_parts_as_ours(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    stream = gzip.decompress(bundle.read_bytes())
    one, two, three = (tmp_path / f"{number}.tar.gz" for number in range(3))
    one.write_bytes(gzip.compress(stream))
    two.write_bytes(gzip.compress(stream[:700]) + gzip.compress(stream[700:]))
    three.write_bytes(gzip.compress(b"") + two.read_bytes())
    for number, path in enumerate((one, two)):
        assert read(path, tmp_path / f"out{number}", trust(key)).signed_by == OWN
    assert "too many parts" in refusal(three, key).message


def test_a_checksum_of_the_packing(bundle: Path, key: SigningKey, tmp_path: Path) -> None:
    contents = bytearray(bundle.read_bytes())
    contents[-8] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(contents)
    assert "cannot be unpacked" in refusal(tmp_path / "b.tar.gz", key).message
