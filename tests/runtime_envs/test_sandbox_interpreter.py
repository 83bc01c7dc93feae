"""Which folders a sandbox shows for a Python; prefixes may be hostile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime_envs.host import load_host_base, make_prefix, python_of
from runtime_envs.sandbox.interpreter import folders_of


def test_a_prefix_of_the_base_host_stands_on_the_platform(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    make_prefix(prefix, load_host_base())
    folders = folders_of(python_of(prefix))
    assert folders[0] == prefix
    assert all({site, *site.parents} & set(folders) for site in load_host_base().site_folders())
    assert any(Path(sys.base_prefix).resolve() == folder.resolve() for folder in folders)


@pytest.mark.parametrize("trick", ["pyvenv.cfg", "lib/python3.12/site-packages/heliostat_platform.pth", "bin/python"])
def test_what_a_tenants_package_names_is_not_shown(tmp_path: Path, trick: str) -> None:
    """A conda package can bring any file of its prefix."""
    secret, planted = tmp_path / "others" / "secret", tmp_path / "prefix" / trick
    secret.mkdir(parents=True)
    planted.parent.mkdir(parents=True)
    if trick == "bin/python":
        (secret / "python").touch()
        planted.symlink_to(secret / "python")
    else:
        planted.write_text(f"home = {secret}\n" if trick == "pyvenv.cfg" else f"{secret}\n")
    assert folders_of(tmp_path / "prefix" / "bin" / "python") == (tmp_path / "prefix",)


def test_never_all_of_the_host(tmp_path: Path) -> None:
    assert Path("/") not in folders_of(Path("/bin/python3"))
