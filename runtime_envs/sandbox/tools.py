"""The host's programs that sandboxes are made with."""

from __future__ import annotations

import os
import shutil
from functools import cache

NAMES = ("bwrap", "setpriv", "prlimit", "choom")
PACKAGES = {"bwrap": "bubblewrap", "setpriv": "util-linux", "prlimit": "util-linux", "choom": "util-linux"}


@cache
def found_programs() -> dict[str, str]:
    """Name → absolute path, in the system's own folders only: those are inside the sandbox too, and no tenant's."""
    found = {name: shutil.which(name, path=os.defpath) for name in NAMES}
    return {name: path for name, path in found.items() if path is not None}


def missing_packages() -> list[str]:
    return sorted({PACKAGES[name] for name in NAMES if name not in found_programs()})
