"""Wheels and interpreters as conda packages: names, needs, places, and the same bytes each time."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from builders_wheels import write_wheel
from packaging.specifiers import SpecifierSet

from runtime_envs.channels import wheels as converted
from runtime_envs.channels.build import build_channel
from runtime_envs.channels.interpreter import Interpreter, find_interpreter, movable
from runtime_envs.channels.package import PLACEHOLDER, Entry, Package, write_package
from runtime_envs.channels.wheels import Wheel, conda_spec
from runtime_envs.conda.bases import FOLDER, conda_bases
from runtime_envs.errors import INVALID, EnvironmentProblem
from runtime_envs.spec import BASES

PYTHON = "3.11.7"


@pytest.mark.parametrize(
    ("pip", "conda"),
    [
        ("", "p"),
        (">=1.2,<2", "p <2,>=1.2"),
        ("==1.4.*", "p 1.4.*"),
        ("~=1.4.2", "p ~=1.4.2"),
        ("==2.13.0+cpu", "p ==2.13.0"),
        ("===1.0", "p ==1.0"),
        ("!=1.5", "p !=1.5"),
    ],
)
def test_versions(pip: str, conda: str) -> None:
    assert conda_spec("p", SpecifierSet(pip)) == conda


def test_needs_with_markers_and_extras(tmp_path: Path) -> None:
    needs = ["torch>=2", "old; python_version<'3.9'", "helper[fast]>1", "dev; extra=='dev'"]
    main = Wheel(write_wheel(tmp_path, "main", "1.0", requires=needs), PYTHON)
    helper = Wheel(write_wheel(tmp_path, "helper", "2.0", requires=["quick; extra=='fast'", "slow"]), PYTHON)
    package = converted.describe(main, {"helper": helper})
    assert package.depends == ("python", "pytorch >=2", "helper >1", "quick")
    assert (package.noarch, package.build) == (True, "py_0")


def test_where_files_go(tmp_path: Path) -> None:
    files = {
        "tool/__init__.py": "",
        "tool-1.0.data/scripts/run": "#!python\nprint()\n",
        "tool-1.0.data/data/share/note.txt": "hi",
        "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main [extra]\n",
    }
    wheel = Wheel(write_wheel(tmp_path, "tool", "1.0", files=files), PYTHON)
    placed = {entry.path: entry for entry in converted.entries(wheel)}
    assert {"site-packages/tool/__init__.py", "python-scripts/run", "share/note.txt"} <= placed.keys()
    assert placed["python-scripts/run"].data.startswith(f"#!{PLACEHOLDER}/bin/python".encode())
    record = placed["site-packages/tool-1.0.dist-info/RECORD"].data.decode()
    assert "../../../bin/run,," in record and "tool/__init__.py,sha256=" in record
    assert converted.describe(wheel, {}).entry_points == ("tool = tool:main",)


def test_a_package_says_which_files_hold_the_prefix(tmp_path: Path) -> None:
    entries = [Entry("bin/tool", f"#!{PLACEHOLDER}/bin/python\n".encode(), True), Entry("bin/t", link_to="tool")]
    package = Package("tool", "1.0", "0", depends=("python",))
    path = write_package(tmp_path / "one", package, entries)
    assert path.read_bytes() == write_package(tmp_path / "two", package, entries).read_bytes()
    with zipfile.ZipFile(path) as archive:
        info = pa.CompressedInputStream(pa.py_buffer(archive.read("info-tool-1.0-0.tar.zst")), "zstd").read()
    text = info.decode(errors="replace")
    assert f'"prefix_placeholder": "{PLACEHOLDER}"' in text and '"path_type": "softlink"' in text


def test_an_interpreter_finds_its_libraries_from_where_it_lies() -> None:
    binary = b"\x7fELF..\0/opt/python/3.11.7/lib\0..\0/opt/python/3.11.7/lib:/usr/lib\0"
    prefix = Path("/opt/python/3.11.7")
    moved = movable(binary, prefix, prefix / "bin")
    assert len(moved) == len(binary)
    assert moved.count(b"$ORIGIN/../lib/") == 2 and b"/opt" not in moved
    assert movable(b"/p/lib\0", Path("/p"), Path("/p/bin")) == b"/p/lib\0"  # no room: it stays


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python"])
def test_what_is_no_interpreter(python: str) -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be run") as caught:
        find_interpreter(Path(python))
    assert caught.value.code == INVALID


def test_what_is_no_wheel(tmp_path: Path) -> None:
    (tmp_path / "x-1.0-py3-none-any.whl").write_text("no")
    for name in ("x-1.0-py3-none-any.whl", "missing-1.0-py3-none-any.whl", "notes.txt"):
        with pytest.raises(EnvironmentProblem, match="not a wheel"):
            build_channel(tmp_path / "channel", [tmp_path / name], Interpreter(PYTHON, Path("/nowhere")))


def test_the_bases() -> None:
    declared = {file.stem: yaml.safe_load(file.read_text()) for file in FOLDER.glob("*.yaml")}
    assert declared.keys() == set(BASES)
    assert all(name == base["name"] for name, base in declared.items())
    assert conda_bases().keys() == set(BASES) - {"host"}
    assert {"python", "pytorch", "transformers", "peft"} <= conda_bases()["cpu"].core_names
    assert json.dumps(declared)  # plain data
