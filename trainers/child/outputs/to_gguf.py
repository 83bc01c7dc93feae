"""A Llama, Mistral or Qwen folder as one GGUF file, for llama.cpp and what is built on it. Weights are not quantised. What this
cannot write so that it means the same is refused: other architectures, scaled rotary positions, tokenizers by unknown rules."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch

from trainers.child.failure import TrainFailure
from trainers.child.outputs.pretokenizer import Described, pretokenizer_of, read_tokenizer
from trainers.child.shards import Shards

Config = Mapping[str, Any]

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""What llama.cpp calls them."""
TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of tokens, as GGUF numbers them."""


def to_gguf(folder: Path, file: Path, kind: str = "bf16", pretokenizer: Optional[str] = None) -> None:
    """`kind`: of the matrices, f32, f16 or bf16; norms and biases stay f32. `pretokenizer`: llama.cpp's name of the rule by which text
    is split before BPE (`llama-bpe`, `smollm`, …), where it is not to be found in the tokenizer.json. Raises TrainFailure."""
    config, described = read_known(folder, kind)
    pretokenizer = pretokenizer or pretokenizer_of(described)
    gguf = importlib.import_module("gguf")
    temporary = file.with_name(f".{file.name}.tmp")
    with Shards(folder) as shards:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[config["model_type"]], use_temp_file=True)
        _write_sizes(writer, config, folder.name, gguf.LlamaFileType[_file_type(kind)])
        _write_tokenizer(writer, folder, described, config["vocab_size"])
        writer.add_tokenizer_pre(pretokenizer)
        for name, tensor in _tensors(gguf, shards, config):
            small = tensor.ndim == 1
            wanted = gguf.GGMLQuantizationType["F32" if small else TYPES[kind]]
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    temporary.replace(file)


def require_known(folder: Path) -> None:
    """Raises TrainFailure for a model that this cannot write so that it means the same."""
    pretokenizer_of(read_known(folder)[1])


def read_known(folder: Path, kind: str = "bf16") -> Tuple[Config, Described]:
    """(its config.json, its tokenizer.json). Raises TrainFailure, but for a rule of the tokenizer that is not known."""
    config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    _check(config, kind)
    return config, read_tokenizer(folder)


def _check(config: Config, kind: str) -> None:
    if kind not in TYPES:
        raise _refused(f"{kind!r} is no type of weights.", f"Use one of {', '.join(TYPES)}.")
    model = config.get("model_type")
    if model not in ARCHITECTURES:
        raise _refused(f"A {model!r} model is not written as GGUF here, only {', '.join(ARCHITECTURES)} are.")
    if _rope(config).get("rope_type", "default") != "default":
        raise _refused("Its rotary positions are scaled.")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise _refused("Its linear layers have biases.")
    if config.get("use_sliding_window"):
        raise _refused("Its layers look back over a window.")


def _refused(message: str, hint: str = "llama.cpp's convert_hf_to_gguf.py knows more architectures.") -> TrainFailure:
    return TrainFailure("gguf_unsupported", message, hint=hint)


def _file_type(kind: str) -> str:
    return "ALL_F32" if kind == "f32" else f"MOSTLY_{TYPES[kind]}"


def _rope(config: Config) -> Dict[str, Any]:
    """transformers 5 keeps it in one place, 4 in two."""
    old = dict(config.get("rope_scaling") or {})
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {"rope_theta": 10000.0, **old, **theta, **(config.get("rope_parameters") or {})}


def _write_sizes(writer: Any, config: Config, name: str, file_type: int) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_tokenizer(writer: Any, folder: Path, described: Described, size: int) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens, kinds = _vocabulary(described, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge for merge in _merges(described)])
    for role in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None:
            getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(False)  # templates write it themselves
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _merges(described: Mapping[str, Any]) -> List[Any]:
    merges: List[Any] = described["model"]["merges"]
    return merges


def _vocabulary(described: Mapping[str, Any], size: int) -> Tuple[List[str], List[int]]:
    """As many tokens as the embedding has rows: models round that up."""
    by_number = {number: (token, NORMAL) for token, number in described["model"]["vocab"].items()}
    for added in described.get("added_tokens", []):
        by_number[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    found = [by_number.get(number, (f"[PAD{number}]", USER_DEFINED)) for number in range(size)]
    return [token for token, _ in found], [kind for _, kind in found]


def _tensors(gguf: Any, shards: Shards, config: Config) -> Iterator[Tuple[str, torch.Tensor]]:
    architecture, heads = ARCHITECTURES[config["model_type"]], config["num_attention_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    turned = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads} if architecture == "llama" else {}
    for name in shards.names:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _refused(f"Its tensor {name} has no place in a GGUF file.")
        tensor, owner = shards.read(name), name.split(".")[-2]
        yield target, _interleaved(tensor, turned[owner]) if owner in turned else tensor


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring numbers of a head, transformers those half a head apart."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
