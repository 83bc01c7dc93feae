"""A schedule as lines of JSON, one for each contiguous run: {"job": 17, "start": 12.0, "end": 312.0, "nodes": {"3": 8}}."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO, cast

from cluster.errors import InvalidRequest
from cluster.simulation.engine import Run


class RunLog:
    """Writes aside; the file has its name once it is whole. `.gz` is compressed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ".part")
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        try:
            if self._path.suffix == ".gz":
                self._file = cast(TextIO, gzip.open(self._aside, "wt", encoding="utf-8", compresslevel=5))
            else:
                self._file = self._aside.open("w", encoding="utf-8")
        except OSError as error:
            raise InvalidRequest(f"{self._path} cannot be written: {error}", param="--log") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._aside.replace(self._path) if kind is None else self._aside.unlink()

    def write(self, run: Run) -> None:
        assert self._file is not None
        line = {"job": run.number, "start": run.start_s, "end": run.end_s, "nodes": run.nodes}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
