"""`code`, and `finetune --code`: what is packed, what is sent."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from cli_said import Run
from fake_service import FakeService

TRAIN = ("finetune", "--base-model", "tiny", "--dataset", "rows", "--entrypoint", "train.py --lr 1")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Three files that belong to it, and some that do not."""
    folder = tmp_path / "mycode"
    for name in ("train.py", "pkg/__init__.py", "pkg/__pycache__/x.pyc", ".git/config", ".venv/bin/python", "old.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "alias.py").symlink_to("train.py")
    return folder


def names(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as tar:
        return tar.getnames()


def test_a_folder_is_packed_without_what_is_not_the_project(cli: Run, service: FakeService, project: Path) -> None:
    said = cli("code", "upload", str(project))
    assert said.code == 0 and "mycode@1" in said.out
    sent = service.bodies[0]
    assert names(sent["data"]) == ["alias.py", "train.py", "pkg/__init__.py"]
    assert (sent["name"], sent["filename"]) == (None, "mycode.tar.gz")
    (project / "train.py").touch()
    cli("code", "upload", str(project), "--name", "other")
    assert service.bodies[1]["data"] == sent["data"] and service.bodies[1]["name"] == "other"


def test_an_archive_is_sent_as_it_is(cli: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "work.zip"
    file.write_bytes(b"PK")
    assert cli("code", "upload", str(file), "--json").json["ref"] == "work@1"
    assert service.bodies[0]["data"] == b"PK"


@pytest.mark.parametrize("link", ["/etc/passwd", "/etc"])
def test_a_link_out_of_the_folder_is_not_followed(cli: Run, service: FakeService, project: Path, link: str) -> None:
    (project / "pkg" / "link").symlink_to(link)
    said = cli("code", "upload", str(project))
    assert said.code == 1 and "link" in said.err and service.bodies == []


def test_an_empty_folder_is_nothing(cli: Run, tmp_path: Path) -> None:
    assert "no file" in cli("code", "upload", str(tmp_path)).err


def test_finetune_uploads_a_folder_and_names_its_version(cli: Run, service: FakeService, project: Path) -> None:
    said = cli(*TRAIN, "--code", str(project), "--param", "hidden=64", "--param", "name=x", "--hyper", "lr=0.5")
    assert said.code == 0
    assert service.bodies[1] == {
        "base_model": "tiny",
        "dataset_id": "rows",
        "method": "custom",
        "entrypoint": "train.py --lr 1",
        "code": "mycode@1",
        "params": {"hidden": 64, "name": "x"},
        "hyperparams": {"lr": 0.5},
    }


def test_finetune_with_code_that_is_there(cli: Run, service: FakeService) -> None:
    assert cli(*TRAIN, "--code", "mycode@3").code == 0
    assert service.bodies[0]["code"] == "mycode@3"


def test_code_is_listed_shown_and_removed(cli: Run, service: FakeService) -> None:
    code = {"id": "code-1", "ref": "mycode@2", "file_count": 1, "bytes": 10, "sha256": "a" * 64, "created_at": 1}
    service.objects = {
        "GET /code": {"data": [code], "has_more": False},
        "GET /code/mycode": {**code, "files": {"train.py": "b" * 64}},
        "DELETE /code/mycode": {"deleted": True},
    }
    assert "mycode@2" in cli("code", "ls").out
    assert "bbbbbbbbbbbb" in cli("code", "show", "mycode").out
    assert cli("code", "rm", "mycode").code == 0
