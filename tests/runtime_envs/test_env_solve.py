from __future__ import annotations

import json
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from builders_wheels import environment_yml, write_wheel

from runtime_envs.errors import INDEX_FAILED, INVALID, UNSOLVABLE, UNSUPPORTED, EnvironmentProblem
from runtime_envs.fingerprint import fingerprint_of
from runtime_envs.host import load_host_base
from runtime_envs.index import PipIndex
from runtime_envs.lock import Solved, check_base, default_lock, read_lock, solve


def versions(solved: Solved) -> dict[str, str]:
    return {package["name"]: package["version"] for package in solved.lock["pip"]}


def unsolvable(index: PipIndex, *pip: str) -> EnvironmentProblem:
    with pytest.raises(EnvironmentProblem) as caught:
        solve(environment_yml(*pip), index=index)
    assert caught.value.code == UNSOLVABLE
    return caught.value


def test_the_newest_version_and_the_one_that_fits(index: PipIndex) -> None:
    assert versions(solve(environment_yml("greeter"), index=index)) == {"greeter": "2.0"}
    assert versions(solve(environment_yml("greeter", "polite"), index=index)) == {"greeter": "1.0", "polite": "1.0"}


def test_a_version_that_uv_cannot_read_is_the_file_s_fault(index: PipIndex) -> None:
    with pytest.raises(EnvironmentProblem, match=r"cannot be read: .*weird") as caught:
        solve(environment_yml("greeter===weird"), index=index)
    assert (caught.value.code, caught.value.fixable_by) == (INVALID, "user")


def test_a_lock_names_wheel_and_hash(index: PipIndex) -> None:
    (package,) = solve(environment_yml("greeter==1.0"), index=index).lock["pip"]
    assert package["filename"] == "greeter-1.0-py3-none-any.whl"
    assert len(package["sha256"]) == 64


def test_what_the_base_has_is_not_installed_again(index: PipIndex) -> None:
    solved = solve(environment_yml("needs-platform"), index=index)
    assert versions(solved) == {"needs-platform": "1.0"}
    assert solved.lock["base"]["packages"]["torch"] == version("torch")
    assert solved.lock["base"]["packages"]["six"] == version("six")


def test_an_ordinary_package_of_the_platform_may_be_overridden(index: PipIndex) -> None:
    solved = solve(environment_yml("six==1.0"), index=index)
    assert versions(solved) == {"six": "1.0"}
    assert "six" not in solved.lock["base"]["packages"]


def test_a_core_package_may_not(index: PipIndex) -> None:
    caught = unsolvable(index, "greeter", "torch==2.5.0")
    assert caught.line == 5
    assert f"torch=={version('torch')}" in caught.message and "torch==2.5.0" in caught.message
    assert "cannot be replaced" in str(caught.hint)


def test_nor_what_a_core_package_needs(index: PipIndex) -> None:
    caught = unsolvable(index, "huggingface-hub==0.1")
    assert "transformers" in caught.message and caught.line == 4


def test_a_package_that_needs_another_core_is_a_conflict(index: PipIndex) -> None:
    caught = unsolvable(index, "needs-old-torch")
    assert caught.line == 4 and "torch<2.4" in caught.message


@pytest.mark.parametrize("requirement", ["greeter==3.0", "no-such-package"])
def test_what_is_not_there(index: PipIndex, requirement: str) -> None:
    caught = unsolvable(index, requirement)
    assert caught.line == 4 and requirement.partition("=")[0] in caught.message and caught.hint


def test_no_path_and_no_decoration_in_a_reason(index: PipIndex) -> None:
    message = unsolvable(index, "greeter==3.0", "polite").message
    assert "/tmp" not in message and "╰" not in message and "\n" not in message


def test_source_distributions_are_never_built(index: PipIndex, tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    (folder / "evil-1.0").mkdir(parents=True)
    (folder / "evil-1.0" / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with tarfile.open(folder / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(folder / "evil-1.0", "evil-1.0")
    unsolvable(PipIndex(find_links=(str(folder),), offline=True, cache_dir=index.cache_dir), "evil")
    assert not (tmp_path / "ran").exists()


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(400)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def test_an_index_that_does_not_answer_as_it_should(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        index = PipIndex(index_url=f"http://me:secret@127.0.0.1:{server.server_port}/simple", cache_dir=tmp_path)
        with pytest.raises(EnvironmentProblem) as caught:
            solve(environment_yml("greeter"), index=index)
        server.shutdown()
    assert (caught.value.code, caught.value.fixable_by) == (INDEX_FAILED, "operator")
    assert "400" in caught.value.message and "secret" not in caught.value.message


def test_naming_what_the_base_has_is_the_default_environment(index: PipIndex) -> None:
    assert solve(environment_yml("torch", "transformers>=4.45"), index=index).lock == default_lock()


def test_solving_again_leaves_no_more_behind(index: PipIndex, tmp_path: Path) -> None:
    fresh = replace(index, cache_dir=tmp_path)

    def files_after_a_solve() -> int:
        solve(environment_yml("greeter"), index=fresh)
        return sum(path.is_file() for path in tmp_path.rglob("*"))

    assert files_after_a_solve() == files_after_a_solve()


def test_the_fingerprint_is_of_the_contents(index: PipIndex) -> None:
    first = solve(environment_yml("greeter", "polite"), index=index)
    second = solve(environment_yml("polite==1.0", "greeter<2", name="other"), index=index)
    third = solve(environment_yml("greeter"), index=index)
    assert first.fingerprint == second.fingerprint and first.dependency_md5 == second.dependency_md5
    assert first.fingerprint != third.fingerprint and first.dependency_md5 != third.dependency_md5
    assert first.fingerprint == fingerprint_of(json.loads(json.dumps(first.lock)))


def test_other_contents_under_the_same_version_are_another_environment(tmp_path: Path) -> None:
    fingerprints: set[str] = set()
    for text in ("A = 1\n", "A = 2\n"):
        folder = tmp_path / str(len(fingerprints))
        folder.mkdir()
        write_wheel(folder, "greeter", "1.0", files={"greeter.py": text})
        index = PipIndex(find_links=(str(folder),), offline=True, cache_dir=folder / "cache")
        fingerprints.add(solve(environment_yml("greeter"), index=index).fingerprint)
    assert len(fingerprints) == 2


def test_a_file_without_packages_is_the_default_environment() -> None:
    solved = solve("name: plain\n")
    assert solved.lock == default_lock() and solved.lock["pip"] == []
    assert solved.lock["base"]["packages"].keys() > {"torch", "transformers", "peft", "numpy"}


def test_the_window_comes_before_the_solve(index: PipIndex) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        solve("name: x\ndependencies: [python=3.9, pytorch=2.0, transformers=4.30]\n", index=index)
    assert caught.value.code == UNSUPPORTED


def test_a_lock_of_another_platform_is_refused() -> None:
    lock = default_lock()
    lock["base"]["packages"]["torch"] = "2.4.0"
    with pytest.raises(EnvironmentProblem, match=r"torch 2\.4\.0 → ") as caught:
        check_base(read_lock(lock), load_host_base())
    assert caught.value.code == "environment_base_changed"


@pytest.mark.parametrize("name", ["greeter\n--index-url https://evil.example", "../greeter", "", "-e"])
def test_a_lock_is_not_trusted(index: PipIndex, name: str) -> None:
    lock = solve(environment_yml("greeter"), index=index).lock
    lock["pip"][0]["name"] = name
    with pytest.raises(EnvironmentProblem, match="Not a lock"):
        read_lock(lock)


def test_an_incomplete_platform_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match="lacks no-such-core"):
        load_host_base(("torch", "no-such-core"))
