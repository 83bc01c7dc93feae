"""Compiles Python files; run by the interpreter that the byte code is for (3.10–3.13), without `site`, so that nothing of a
package is executed. stdin: JSON, pairs of source and target: a package chooses names. A file that does not compile is left out."""

import json
import py_compile
import sys
from pathlib import Path

for source, target in json.load(sys.stdin):
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        py_compile.compile(source, cfile=target, doraise=True, quiet=2)
    except (py_compile.PyCompileError, OSError, ValueError, RecursionError, MemoryError):
        continue
