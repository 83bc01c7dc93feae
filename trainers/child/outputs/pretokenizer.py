"""By which of its rules llama.cpp must split text before BPE, so that it finds the tokens that the model was trained on. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from trainers.child.failure import TrainFailure

Described = Mapping[str, Any]
"""A tokenizer.json."""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{WORDS}|\p{{N}}{{1,3}}|{REST}"
QWEN2 = rf"{WORDS}|\p{{N}}|{REST}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES: Dict[Tuple[Tuple[str, ...], bool], str] = {
    (("words",), False): "gpt-2",
    (("digits", "words"), False): "smollm",
    ((LLAMA3, "bytes"), True): "llama-bpe",
    ((LLAMA3, "bytes"), False): "dbrx",
    ((QWEN2, "bytes"), False): "qwen2",
    ((TEKKEN, "bytes"), True): "tekken",
}
"""By the steps, and whether a word that is a token is taken whole without looking at merges: llama.cpp ties that to the name."""


def read_tokenizer(folder: Path) -> Described:
    """Raises TrainFailure when the folder has no tokenizer.json."""
    try:
        described: Described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _refused("It has no tokenizer.json") from error
    return described


def pretokenizer_of(described: Described) -> str:
    """llama.cpp's name of the rule. Raises TrainFailure for a tokenizer that it has no rule for, or none known here."""
    model = described["model"]
    steps = _steps(described.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not {"words", "bytes"} & set(steps):
        raise _refused("Its tokenizer is no byte-level BPE")
    normalizer = described.get("normalizer")
    name = NAMES.get((tuple(steps), bool(model.get("ignore_merges"))))
    # llama.cpp leaves text as it is; that in NFC, which nearly all is, means the same
    if name is None or (normalizer and normalizer["type"] != "NFC"):
        raise _refused("Its tokenizer splits text by a rule that is none of those of llama.cpp known here")
    return name


def restore(folder: Path, name: str) -> None:
    """Gives the folder's tokenizer.json the rule of that name, where it is known: transformers reads tokens and merges out of a GGUF
    file, but splits by GPT-2's rule."""
    steps, whole = next((key for key, known in NAMES.items() if known == name), ((), False))
    described: Dict[str, Any] = {**read_tokenizer(folder)}
    if steps and described["model"].get("type") == "BPE":
        described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [_step(one) for one in steps]}
        described["model"]["ignore_merges"] = whole
        (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")


def _step(named: str) -> Dict[str, Any]:
    """As `tokenizers` writes it; the other way round than `_steps`."""
    if named in ("words", "bytes"):
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": named == "words"}
    if named == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": named}, "behavior": "Isolated", "invert": False}


def _steps(pre: Optional[Mapping[str, Any]]) -> List[str]:
    if pre is None:
        return []
    if pre["type"] == "Sequence":
        return [step for one in pre["pretokenizers"] for step in _steps(one)]
    if pre["type"] == "ByteLevel" and not pre.get("add_prefix_space", True):
        return ["words" if pre.get("use_regex", True) else "bytes"]
    if pre["type"] == "Digits" and pre.get("individual_digits"):
        return ["digits"]
    if pre["type"] == "Split" and (pre["behavior"], pre["invert"]) in (("Isolated", False), ("Removed", True)):
        return [str(pre["pattern"].get("Regex"))]
    return [f"{pre['type']}, not known here"]


def _refused(message: str) -> TrainFailure:
    hint = "llama.cpp's convert_hf_to_gguf.py knows more tokenizers: take the output merged, and convert that."
    return TrainFailure("gguf_unsupported", f"{message}, so that a GGUF file would not mean the same.", hint=hint)
