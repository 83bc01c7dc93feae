"""Which folders of the host a Python needs: its own prefix, and of the platform what it stands on."""

from __future__ import annotations

import sys
from pathlib import Path

from runtime_envs.host import PLATFORM_PTH

ROOT = Path("/")


def folders_of(python: Path) -> tuple[Path, ...]:
    """Of `<prefix>/bin/python`: the prefix; and with the base `host`, whose prefixes name them, the platform's Python and
    packages. Nothing else that a prefix names: a tenant's package could have written it there."""
    prefix = python.parent.parent
    allowed = platform_folders()
    return tuple(dict.fromkeys(one for one in (prefix, *_named(python)) if one in {prefix, *allowed} - {ROOT}))


def platform_folders() -> frozenset[Path]:
    """Of the Python that runs this, as venvs of it name them."""
    base = Path(sys.base_prefix)
    packages = [Path(entry) for entry in sys.path if entry.endswith(("/site-packages", "/dist-packages"))]
    return frozenset([base, base.resolve(), *packages])


def _named(python: Path) -> list[Path]:
    prefix = python.parent.parent
    found = [python.resolve().parent.parent]
    if (config := prefix / "pyvenv.cfg").is_file():
        found += [Path(home).parent for home in _values(config.read_text(encoding="utf-8", errors="replace"), "home")]
    for borrowed in prefix.glob(f"lib/python3*/site-packages/{PLATFORM_PTH}"):
        found += [Path(line) for line in borrowed.read_text(encoding="utf-8", errors="replace").splitlines()]
    return found


def _values(text: str, key: str) -> list[str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]
