"""Where pip packages come from: given, or as this machine's pip is configured (uv does not read pip's settings)."""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SECTIONS = ("global", "install")
"""Of a pip.conf; the later one wins."""


@dataclass(frozen=True)
class PipIndex:
    """`find_links` are folders or URLs of wheels; `offline` looks at them only. `cert` is a PEM bundle. `cache_dir` is for
    solving (None: the user's cache folder)."""

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    trusted_hosts: tuple[str, ...] = ()
    cert: str | None = None
    offline: bool = False
    cache_dir: Path | None = None

    def lines(self) -> list[str]:
        """For the head of a requirements file: URLs may hold passwords, which a command line would show to everyone."""
        links = [f"--find-links {_as_url(link)}" for link in self.find_links]
        if self.offline:
            return ["--no-index", *links]
        index = [f"--index-url {_as_url(self.index_url)}"] if self.index_url else []
        return [*index, *(f"--extra-index-url {_as_url(url)}" for url in self.extra_index_urls), *links]


def _as_url(place: str) -> str:
    return place if "://" in place else Path(place).expanduser().absolute().as_uri()


def machine_index(environ: Mapping[str, str] = os.environ, files: tuple[Path, ...] | None = None) -> PipIndex:
    """What `pip install` on this machine would use: pip.conf files under PIP_* variables, each key as a whole."""
    values: dict[str, str] = {}
    for file in pip_files(environ) if files is None else files:
        values.update(_read(file))
    values.update(_from_environment(environ))
    return PipIndex(
        index_url=values.get("index-url") or None,
        extra_index_urls=tuple(values.get("extra-index-url", "").split()),
        find_links=tuple(values.get("find-links", "").split()),
        trusted_hosts=tuple(values.get("trusted-host", "").split()),
        cert=values.get("cert") or None,
        offline=values.get("no-index", "").lower() in ("1", "true", "yes", "on"),
    )


def pip_files(environ: Mapping[str, str]) -> tuple[Path, ...]:
    """pip's own order: machine, user, virtual environment, PIP_CONFIG_FILE; the later one wins."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return ()
    home = Path(environ.get("HOME") or Path.home())
    system = [Path(folder) / "pip" / "pip.conf" for folder in environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"
    files = [*system, Path("/etc/pip.conf"), home / ".pip" / "pip.conf", user, Path(sys.prefix) / "pip.conf"]
    return (*files, Path(named)) if named else tuple(files)


def _read(file: Path) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(file, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError, PermissionError):
        return {}  # pip would stop here; an environment may still solve with what the other files say
    return {
        key.replace("_", "-"): value
        for name in SECTIONS
        if parser.has_section(name)
        for key, value in parser[name].items()
    }


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            yield name.removeprefix("PIP_").lower().replace("_", "-"), value
