"""The base as wheels that hold nothing but metadata, so that the resolver knows exactly what is installed, also where no
index has it (`2.13.0+cpu`) or is reachable. They are never installed."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from runtime_envs.host import Installed


def base_wheels(installed: Iterable[Installed], cache_dir: Path) -> Path:
    """The folder of these wheels. It keeps its place as long as the platform does not change: uv remembers the wheels by
    path and time, and a new folder for every solve would fill its cache."""
    metadata = {_stem(package): _metadata(package) for package in installed}
    digest = hashlib.sha256("".join(f"{stem}\n{metadata[stem]}" for stem in sorted(metadata)).encode()).hexdigest()
    folder = cache_dir / f"base-{digest[:16]}"
    if not folder.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as aside:
            new = Path(aside) / "wheels"
            _write(new, metadata)
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same contents
                    raise
    return folder


def _stem(package: Installed) -> str:
    return f"{package.name.replace('-', '_')}-{package.version}"


def _metadata(package: Installed) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {package.name}", f"Version: {package.version}"]
    lines += [f"Provides-Extra: {extra}" for extra in package.extras]
    lines += [f"Requires-Dist: {requirement}" for requirement in package.requires]
    return "\n".join(lines) + "\n"


def _write(folder: Path, metadata: Mapping[str, str]) -> None:
    folder.mkdir()
    for stem, text in metadata.items():
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", text)
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
