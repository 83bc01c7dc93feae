"""How many parameters a model has, from its config.json alone. Pure; an unknown architecture answers None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """One linear layer's shape."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a training."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    vocabulary: int
    linears: tuple[Linear, ...]
    """Of one layer: what LoRA's "all linear" adapts."""
    context: int


def read_shape(config: Config) -> ModelShape | None:
    """None: not one of the architectures known here, or a config that lacks what it should say."""
    reader = _READERS.get(str(config.get("model_type", "")))
    try:
        return reader(config) if reader else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _llama(config: Config) -> ModelShape:
    """Llama, Mistral, Qwen2, Qwen3, Gemma: gated MLP, grouped keys, RMS norms."""
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    intermediate, heads = int(config["intermediate_size"]), int(config["num_attention_heads"])
    kind, vocabulary = str(config["model_type"]), int(config["vocab_size"])
    width = int(config.get("head_dim") or hidden // heads)
    kv_width = width * int(config.get("num_key_value_heads") or heads)
    linears = (
        Linear(hidden, width * heads),
        Linear(hidden, kv_width),
        Linear(hidden, kv_width),
        Linear(width * heads, hidden),
        Linear(hidden, intermediate),
        Linear(hidden, intermediate),
        Linear(intermediate, hidden),
    )
    biases = width * heads + 2 * kv_width if kind == "qwen2" else 0
    norms = {"gemma2": 4 * hidden, "gemma3_text": 4 * hidden + 2 * width, "qwen3": 2 * hidden + 2 * width}
    layer = _weights(linears) + biases + norms.get(kind, 2 * hidden)
    tied = bool(config.get("tie_word_embeddings", kind.startswith("gemma")))
    total = layers * layer + hidden + vocabulary * hidden * (1 if tied else 2)
    context = int(config.get("max_position_embeddings", 4096))
    return ModelShape(total, layers, hidden, intermediate, heads, kv_width, vocabulary, linears, context)


def _gpt2(config: Config) -> ModelShape:
    hidden, layers, vocabulary = int(config["n_embd"]), int(config["n_layer"]), int(config["vocab_size"])
    context, intermediate = int(config.get("n_positions", 1024)), int(config.get("n_inner") or 4 * hidden)
    linears = (
        Linear(hidden, 3 * hidden),
        Linear(hidden, hidden),
        Linear(hidden, intermediate),
        Linear(intermediate, hidden),
    )
    layer = _weights(linears) + sum(linear.outputs for linear in linears) + 4 * hidden
    total = layers * layer + (vocabulary + context) * hidden + 2 * hidden
    heads = int(config["n_head"])
    return ModelShape(total, layers, hidden, intermediate, heads, hidden, vocabulary, linears, context)


def _bert(config: Config) -> ModelShape:
    hidden, layers, vocabulary = (
        int(config["hidden_size"]),
        int(config["num_hidden_layers"]),
        int(config["vocab_size"]),
    )
    intermediate, context = int(config["intermediate_size"]), int(config.get("max_position_embeddings", 512))
    linears = (*[Linear(hidden, hidden)] * 4, Linear(hidden, intermediate), Linear(intermediate, hidden))
    layer = _weights(linears) + sum(linear.outputs for linear in linears) + 4 * hidden
    embeddings = (vocabulary + context + int(config.get("type_vocab_size", 2))) * hidden + 2 * hidden
    total = layers * layer + embeddings + hidden * hidden + hidden  # with the pooler
    heads = int(config["num_attention_heads"])
    return ModelShape(total, layers, hidden, intermediate, heads, hidden, vocabulary, linears, context)


def _weights(linears: tuple[Linear, ...]) -> int:
    return sum(linear.inputs * linear.outputs for linear in linears)


_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
_READERS: dict[str, Callable[[Config], ModelShape]] = {
    **dict.fromkeys(_GATED, _llama),
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
