"""`python -m trainers.child.outputs merged|gguf|curves|tensorboard …`: more forms of what a run left; prints one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Dict, List, Optional

from trainers.child.failure import TrainFailure, describe
from trainers.child.outputs.history import History, read_history

Answer = Dict[str, Any]


def _merged(options: argparse.Namespace) -> Answer:
    from trainers.child.outputs.merged import merge

    return {"folder": str(options.out), "sha256": merge(options.base, options.adapter, options.out)}


def _gguf(options: argparse.Namespace) -> Answer:
    from trainers.child.outputs.to_gguf import to_gguf

    to_gguf(options.folder, options.out, options.type, options.pretokenizer)
    return {"file": str(options.out), "bytes": options.out.stat().st_size}


def _curves(options: argparse.Namespace) -> Answer:
    from trainers.child.outputs.curves import draw

    history = _history(options.messages)
    draw(history, options.out)
    return {"file": str(options.out), "steps": history.steps}


def _tensorboard(options: argparse.Namespace) -> Answer:
    from trainers.child.outputs.curves import write_events

    history = _history(options.messages)
    write_events(history, options.out)
    return {"folder": str(options.out), "steps": history.steps}


def _history(file: Path) -> History:
    with file.open(encoding="utf-8") as lines:
        return read_history(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainers.child.outputs", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Answer], about: str, *places: str) -> Any:
        made = commands.add_parser(name, help=about, description=about)
        for place in places:
            made.add_argument(place, type=Path)
        made.set_defaults(run=run)
        return made

    command("merged", _merged, "A LoRA adapter merged into its base.", "base", "adapter", "out")
    gguf = command("gguf", _gguf, "A Llama, Mistral or Qwen folder as one GGUF file.", "folder", "out")
    gguf.add_argument("--type", default="bf16", help="f32, f16 or bf16")
    gguf.add_argument("--pretokenizer", help="llama.cpp's name of it, such as llama-bpe; else as tokenizer.json has it")
    command("curves", _curves, "Loss and more over the steps, as PNG.", "messages", "out")
    command("tensorboard", _tensorboard, "The same as TensorBoard event files.", "messages", "out")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    """0; 1 when it is refused."""
    options = _parser().parse_args(arguments)
    try:
        answer = options.run(options)
    except (TrainFailure, OSError) as error:
        failure = describe(error)
        answer = {"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
