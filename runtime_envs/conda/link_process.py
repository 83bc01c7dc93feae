"""Links files from one tree of folders into another. Some of these run side by side: a loop in Python takes longer than the kernel.

stdin: JSON {source, target, folders: {folder: {name: [size, mtime_ns], or null for a symbolic link}}}; stdout: JSON, the first file
that is not so (`changed`), the error, or nothing. Loads nothing of the house."""

from __future__ import annotations

import json
import os
import sys

Names = dict[str, "list[int] | None"]


def link(names: Names, source: str, target: str) -> str | None:
    if os.path.realpath(target) != target:
        return ""  # a package that came before has a link there, to anywhere
    make_folder(target)
    here, there = (os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in (source, target))
    for name, expected in names.items():
        os.link(name, name, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)
        if expected is not None:
            status = os.lstat(name, dir_fd=there)
            if status.st_mtime_ns != expected[1] or status.st_size != expected[0]:
                return name
    os.close(here)
    os.close(there)
    return None


def make_folder(folder: str) -> None:
    try:
        os.mkdir(folder, 0o755)  # noqa: PTH102 - thousands of them: a Path costs more than the call
    except FileExistsError:
        return
    except FileNotFoundError:
        make_folder(folder.rpartition("/")[0])
        make_folder(folder)


def main() -> None:
    question = json.load(sys.stdin)
    answer: dict[str, object] = {}
    target = os.path.realpath(question["target"])
    try:
        for folder, names in question["folders"].items():
            changed = link(names, f"{question['source']}/{folder}", os.path.normpath(f"{target}/{folder}"))
            if changed is not None:
                answer = {"changed": f"{folder}/{changed}"}
                break
    except OSError as error:
        answer = {"errno": error.errno, "message": error.strerror, "file": str(error.filename)}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
