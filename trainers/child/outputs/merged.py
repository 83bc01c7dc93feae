"""A LoRA adapter merged into its base: a model folder that needs no peft. Works file by file, so that it never holds more of the
model than one file of it."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

from safetensors.torch import load_file, save_file

from trainers.child.failure import TrainFailure
from trainers.child.folders import aside, publish
from trainers.child.shards import Shards

PREFIX = "base_model.model."
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
NOT_MERGED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "lora_bias")
"""Fields of an adapter that mean more than B·A; with one of them set, merging is refused rather than wrong."""


@dataclass(frozen=True)
class Adapter:
    """`pairs`: by the name of a base weight, (A [r, in], B [out, r])."""

    pairs: Dict[str, Any]
    scaling: float
    transposed: bool
    """The base's weights lie as [in, out] (GPT-2)."""

    def merge(self, name: str, weight: Any) -> Any:
        """W + scaling · B·A, summed in fp32, in the weight's type."""
        if name not in self.pairs:
            return weight
        down, up = self.pairs[name]
        delta = self.scaling * (up.float() @ down.float())
        return (weight.float() + (delta.T if self.transposed else delta)).to(weight.dtype).contiguous()


def merge(base: Path, adapter: Path, out: Path) -> Dict[str, str]:
    """Writes the folder `out`; {file: sha256}. Raises TrainFailure."""
    with Shards(base) as shards:
        found = read_adapter(adapter, shards.names)
        temporary = aside(out)
        _copy_small(base, adapter, temporary)
        for file, names in shards.files.items():
            merged = {name: found.merge(name, shards.read(name)) for name in names}
            save_file(merged, temporary / file, metadata={"format": "pt"})
    return publish(temporary, out)


def read_adapter(folder: Path, base_names: "list[str]") -> Adapter:
    """Raises TrainFailure: no LoRA, or one that does not fit the base's names."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except OSError as error:
        raise _refused(f"{folder} has no adapter: {error.strerror}.", "Name the folder of a LoRA adapter.") from error
    special = [key for key in NOT_MERGED if config.get(key)]
    if config.get("peft_type") != "LORA" or special:
        what = ", ".join(special) or config.get("peft_type")
        raise _refused(f"An adapter with {what} is not merged here.", "Use peft's own merge_and_unload.")
    known = set(base_names)
    pairs = {}
    for key, down in weights.items():
        if key.endswith(".lora_A.weight"):
            module = key[len(PREFIX) : -len(".lora_A.weight")]
            pairs[_name_in(known, module)] = (down, weights[key.replace(".lora_A.", ".lora_B.")])
    if 2 * len(pairs) != len(weights):
        raise _refused("The adapter holds weights that are no LoRA.", "Use peft's own merge_and_unload.")
    rank = config["r"]
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Adapter(pairs, scaling, bool(config.get("fan_in_fan_out")))


def _name_in(known: "set[str]", module: str) -> str:
    """Files leave out the inner model's prefix for some architectures."""
    for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
        if name in known:
            return name
    raise _refused(
        f"The base has no weight for the adapter's {module}.", "Name the base that the adapter was trained on."
    )


def _copy_small(base: Path, adapter: Path, out: Path) -> None:
    """Configuration and index of the base; tokenizer and chat template of the adapter, where it has them."""
    for source in (base, adapter):
        for path in sorted(source.iterdir()):
            weights = any(path.match(pattern) for pattern in WEIGHTS)
            if path.is_file() and not weights and path.name not in ("adapter_config.json", "README.md"):
                shutil.copyfile(path, out / path.name)
    card = adapter / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").replace("library_name: peft", "library_name: transformers")
        (out / "README.md").write_text(text, encoding="utf-8")


def _refused(message: str, hint: str) -> TrainFailure:
    return TrainFailure("adapter_not_mergeable", message, hint=hint)
