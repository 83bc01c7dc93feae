"""Tensors of a Hugging Face folder by name, memory-mapped: what is not asked for is not read, however many files there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List

from safetensors import safe_open

from trainers.child.failure import TrainFailure

INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.")


class Shards:
    """A context: open files are closed at its end. Raises TrainFailure when the folder has no safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files_by_name(folder)
        self._stack = ExitStack()
        self._open: Dict[str, Any] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
        self._stack.close()

    @property
    def names(self) -> List[str]:
        return list(self._files)

    @property
    def files(self) -> Dict[str, List[str]]:
        """Names by file, in the files' order."""
        found: Dict[str, List[str]] = {}
        for name, file in self._files.items():
            found.setdefault(file, []).append(name)
        return dict(sorted(found.items()))

    def read(self, name: str, dtype: Any = None) -> Any:
        """A tensor; cast if `dtype` is given, else a view of the file."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        tensor = self._open[file].get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def layers(self, first: int, last: int) -> Iterator[str]:
        """Names of the tensors of layers `first` … `last` - 1."""
        for name in self._files:
            found = LAYER.search(name)
            if found and first <= int(found.group(1)) < last:
                yield name


def _files_by_name(folder: Path) -> Dict[str, str]:
    index = folder / INDEX
    if index.is_file():
        written: Dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if any(Path(file).name != file for file in written.values()):
            raise _unusable(folder, "its index names files outside of it")
        return written
    if not (folder / "model.safetensors").is_file():
        raise _unusable(folder, "it has no safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _unusable(folder: Path, reason: str) -> TrainFailure:
    hint = "Name a Hugging Face model folder whose weights are safetensors."
    return TrainFailure("model_not_loadable", f"{folder} cannot be read as a model: {reason}.", hint=hint)
