from __future__ import annotations

from pathlib import Path

from runtime_envs.index import PipIndex, machine_index, pip_files
from runtime_envs.uv import clean_environment


def test_pip_configuration_files_and_variables(tmp_path: Path) -> None:
    machine, user = tmp_path / "machine.conf", tmp_path / "user.conf"
    machine.write_text("[global]\nindex-url = https://mirror.example/simple\nfind-links = /srv/a\n")
    user.write_text(
        "[global]\nextra_index_url =\n  https://one.example\n  https://two.example\n[install]\nfind-links = /srv/b /srv/c\n"
    )
    index = machine_index({"PIP_CERT": "/etc/ca.pem", "PIP_NO_INDEX": "0"}, (machine, user, tmp_path / "none.conf"))
    assert index.index_url == "https://mirror.example/simple"
    assert index.extra_index_urls == ("https://one.example", "https://two.example")
    assert index.find_links == ("/srv/b", "/srv/c")
    assert (index.cert, index.offline) == ("/etc/ca.pem", False)


def test_variables_win_over_files(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nfind-links = /srv/a\n")
    index = machine_index({"PIP_FIND_LINKS": "/srv/z", "PIP_NO_INDEX": "1"}, (file,))
    assert (index.find_links, index.offline) == (("/srv/z",), True)


def test_where_pip_looks() -> None:
    files = pip_files({"HOME": "/home/me", "PIP_CONFIG_FILE": "/srv/pip.conf"})
    assert Path("/etc/pip.conf") in files and Path("/home/me/.config/pip/pip.conf") in files
    assert files[-1] == Path("/srv/pip.conf")
    assert pip_files({"PIP_CONFIG_FILE": "/dev/null"}) == ()


def test_a_broken_file_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("find-links = before any section\n")
    assert machine_index({}, (file,)) == PipIndex()


def test_lines_of_a_requirements_file() -> None:
    index = PipIndex(
        index_url="https://me:secret@mirror.example/simple", extra_index_urls=("/srv/simple",), find_links=("/a b",)
    )
    assert index.lines() == [
        "--index-url https://me:secret@mirror.example/simple",
        "--extra-index-url file:///srv/simple",
        "--find-links file:///a%20b",
    ]
    assert PipIndex(index_url="https://mirror.example", find_links=("/a",), offline=True).lines() == [
        "--no-index",
        "--find-links file:///a",
    ]


def test_uv_sees_no_settings_of_the_caller() -> None:
    environ = {
        "UV_INDEX_URL": "https://other.example",
        "VIRTUAL_ENV": "/v",
        "HOME": "/h",
        "HTTPS_PROXY": "p",
        "SECRET": "s",
    }
    clean = clean_environment(environ, PipIndex(cert="/ca.pem"))
    assert clean["HOME"] == "/h" and clean["HTTPS_PROXY"] == "p" and clean["SSL_CERT_FILE"] == "/ca.pem"
    assert not {"UV_INDEX_URL", "VIRTUAL_ENV", "SECRET"} & clean.keys()
