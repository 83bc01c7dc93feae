"""More forms of a model, made beside it in its artifact at the end of a run. A form that cannot be made is left out and named: the
training was not for nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import List

from trainers.child.failure import TrainFailure
from trainers.child.outputs.curves import draw, require_library, write_events
from trainers.child.outputs.history import Journal
from trainers.child.outputs.merged import merge
from trainers.child.outputs.to_gguf import require_known, to_gguf
from trainers.config import TrainConfig

MERGED, GGUF, CURVES, TENSORBOARD = "merged", "gguf", "curves", "tensorboard"
GGUF_FILE = "model.gguf"


def require_forms(config: TrainConfig) -> None:
    """Before the first step: what this model could never become. Raises TrainFailure."""
    wanted = {MERGED, GGUF} & set(config.outputs)
    if wanted and config.task != "causal_lm":
        message = f"The output {sorted(wanted)[0]} is made of causal language models, not of a {config.task} model."
        raise TrainFailure("output_unsupported", message, hint="Leave it out.")
    if GGUF in wanted:
        require_library("gguf")
        require_known(Path(config.base_model))


def add_forms(folder: Path, config: TrainConfig) -> List[str]:
    """Writes `merged/` and `gguf/model.gguf` into `folder`, which holds the model; why one is left out, a sentence each. Raises
    OSError and SafetensorError when the disk is full."""
    left_out: List[str] = []
    adapts = (folder / "adapter_config.json").is_file()
    whole = folder / MERGED if adapts else folder
    try:
        if adapts and {MERGED, GGUF} & set(config.outputs):
            merge(Path(config.base_model), folder, whole)
        if GGUF in config.outputs:
            (folder / GGUF).mkdir()
            to_gguf(whole, folder / GGUF / GGUF_FILE)
    except TrainFailure as failure:
        left_out.append(f"The model is stored without its other forms: {failure.message}")
        shutil.rmtree(folder / GGUF, ignore_errors=True)
    if MERGED not in config.outputs:
        shutil.rmtree(folder / MERGED, ignore_errors=True)
    return left_out


def add_curves(folder: Path, outputs: Sequence[str], journal: Journal) -> List[str]:
    """Writes `curves.png` and `tensorboard/`; as `add_forms`."""
    left_out: List[str] = []
    history = journal.history()
    for form, name, write in ((CURVES, "curves.png", draw), (TENSORBOARD, TENSORBOARD, write_events)):
        if form not in outputs or not history.series:
            continue
        try:
            write(history, folder / name)
        except TrainFailure as failure:
            left_out.append(f"The model is stored without {name}: {failure.message} {failure.hint}")
    return left_out
