"""`python -m trainers.child.convert SOURCE OUT [--chat-template T]`: a Hugging Face folder, a GGUF file or a hub id becomes a
folder that training can load. Prints one JSON object. Never reads a format that can run code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.child.chat import CHATML
from trainers.child.failure import TrainFailure
from trainers.child.outputs.pretokenizer import restore

KEPT = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
MAX_HEADER_BYTES = 100 << 20
ENCODES = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "Model")
"""Ends of the names of architectures that write no text: base models of classifiers."""


@dataclass
class Report:
    """What is printed."""

    parameters: int
    architecture: str
    config: dict[str, Any]
    chat_template_source: str
    """model, option or chatml; none for an encoder, which has no conversations."""
    warnings: list[str] = field(default_factory=list)


def convert(source: str, out: Path, chat_template: str | None = None) -> Report:
    """Raises TrainFailure. `chat_template`: `chatml` or a file."""
    out.mkdir(parents=True, exist_ok=True)
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        _from_gguf(path, out)
    elif path.is_dir():
        _from_folder(path, out)
    elif not path.exists() and HUB_ID.fullmatch(source):
        _from_folder(_fetch(source), out)
    else:
        raise _refused(
            "model_not_found",
            f"{source} is neither a folder, nor a .gguf file, nor a hub id (owner/name).",
            "Give the path of a Hugging Face folder or of a GGUF file that exists on this machine.",
        )
    config = _check_config(out)
    encodes = config["architectures"][0].endswith(ENCODES)
    template, warnings = ("none", []) if encodes else _settle_template(out, chat_template)
    return Report(count_parameters(out.glob("*.safetensors")), config["architectures"][0], config, template, warnings)


def _from_folder(folder: Path, out: Path) -> None:
    if not (folder / "config.json").is_file():
        raise _refused("model_not_found", f"{folder} has no config.json.", "Give a Hugging Face model folder.")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("pytorch_model*.bin")):
            hint = "Save it again with model.save_pretrained(folder, safe_serialization=True), and add that folder."
            raise _refused(
                "model_format_unsafe", "Its weights are in pickle files, which can run code when read.", hint
            )
        raise _refused(
            "model_not_found", f"{folder} has no .safetensors file.", "Give a folder with the model's weights."
        )
    for pattern in KEPT:
        for file in folder.glob(pattern):
            if file.is_file():
                _link_or_copy(file.resolve(), out / file.name)


def _link_or_copy(file: Path, target: Path) -> None:
    """Weights are large and never written again: one inode will do where the file system allows it."""
    target.unlink(missing_ok=True)
    if file.suffix == ".safetensors":
        try:
            os.link(file, target)
            return
        except OSError:
            pass  # another file system, or links are forbidden: copy
    shutil.copyfile(file, target)


def _from_gguf(path: Path, out: Path) -> None:
    """Dequantises; the tokenizer and the chat template come out of the file too."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        splits = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except (OSError, ValueError, KeyError, NotImplementedError, struct.error) as error:
        hint = "transformers reads GGUF files of the common architectures; a Hugging Face folder of the model always works."
        raise _refused("gguf_unsupported", f"{path.name} cannot be read: {error}", hint) from error
    # it is no longer quantised, and saving must not think so
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if splits is not None:
        restore(out, str(splits.contents()))
    for file in out.iterdir():
        file.chmod(0o644)  # safetensors makes its files readable by their owner only


def _fetch(hub_id: str) -> Path:
    os.environ.pop("HF_HUB_OFFLINE", None)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = hub_id.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(KEPT)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = "Check the name and this machine's way to the hub, or download the model elsewhere and give its folder."
        raise _refused("hub_unreachable", f"{hub_id} could not be fetched: {error}", hint) from error


def _check_config(folder: Path) -> dict[str, Any]:
    """The configuration of a causal language model, or of an encoder that can be made to classify, that the installed
    transformers knows, without code of its own."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    known = _architectures(kind)
    architectures = config.setdefault("architectures", known[:1])
    if "auto_map" in config or not architectures or architectures[0] not in known:
        message = (
            f"A {kind!r} model ({architectures}) is no language model or encoder that transformers knows by itself."
        )
        hint = "Code that comes with a model is never run here. Use a model that transformers supports."
        raise _refused("model_unsupported", message, hint)
    if "quantization_config" in config:
        message = f"The weights are quantised ({config['quantization_config'].get('quant_method', 'unknown method')})."
        raise _refused("model_unsupported", message, "Add the model as it was before it was quantised.")
    return config


def _architectures(kind: Any) -> list[str]:
    """What a model of this type may call itself: a causal language model, or, where it can classify, an encoder."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if kind not in CONFIG_MAPPING_NAMES:
        return []
    mappings = [modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        mappings += [
            modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            modeling_auto.MODEL_MAPPING_NAMES,
        ]
    found = [mapping.get(kind, ()) for mapping in mappings]
    return [name for names in found for name in ([names] if isinstance(names, str) else names)]


def _settle_template(folder: Path, option: str | None) -> tuple[str, list[str]]:
    """(where the chat template comes from, warnings)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        hint = "Put the tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights."
        raise _refused("tokenizer_not_loadable", f"The tokenizer cannot be loaded: {error}", hint) from error
    if option is None and tokenizer.chat_template:
        return "model", []
    warnings: list[str] = []
    if option is None:
        warnings.append("The model has no chat template; ChatML is used. Give --chat-template to choose another.")
    tokenizer.chat_template = CHATML if option in (None, "chatml") else _read_template(str(option))
    tokenizer.save_pretrained(folder)
    return ("chatml" if option is None else "option"), warnings


def _read_template(name: str) -> str:
    if not Path(name).is_file():
        hint = "Give chatml, or a file with a Jinja template."
        raise _refused("chat_template_not_found", f"There is no chat template {name!r}.", hint)
    return Path(name).read_text(encoding="utf-8")


def count_parameters(files: Iterable[Path]) -> int:
    """From the headers: a safetensors file begins with the length of a JSON header, then the header."""
    total = 0
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise _refused("model_damaged", f"{path.name} is not a safetensors file.", "Download the model again.")
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            size = 1
            for extent in tensor["shape"] if name != "__metadata__" else [0]:
                size *= extent
            total += size
    return total


def _refused(code: str, message: str, hint: str) -> TrainFailure:
    return TrainFailure(code, message, hint=hint)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes a folder that training can load.")
    parser.add_argument("source", help="a Hugging Face folder, a .gguf file, or a hub id (owner/name)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--chat-template", metavar="FILE_OR_NAME", help="a Jinja file, or chatml")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # libraries log to stdout; only the answer belongs there
            answer = vars(convert(options.source, options.out, options.chat_template))
    except TrainFailure as failure:
        answer = {"error": {"code": failure.code, "message": failure.message, "hint": failure.hint}}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
