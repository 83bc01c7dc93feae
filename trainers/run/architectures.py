"""What a model is made of, from its config.json alone: parameters, and what a layer keeps for its backward pass. Pure; an
unknown architecture answers None."""

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
class Layer:
    """What one layer computes, as far as memory depends on it. Widths in numbers."""

    linears: tuple[Linear, ...]
    """What LoRA's "all linear" adapts."""
    nonlinear: int
    """Tensors as wide as the MLP that its nonlinearity keeps, besides the input of the last linear."""
    norms: int
    """Norms as wide as the hidden state."""
    rms: bool = True
    """RMS norms compute in fp32, layer norms in the precision of the model."""
    wide_norm: bool = False
    """A trained norm's weight meets its normalised input in fp32 (Gemma)."""
    head_norms: bool = False
    """Query and key are normalised head by head."""
    scores: str = "none"
    """Attention scores that are kept: none; `capped` (Gemma 2 computes them plainly); `dropped` (dropout on the scores: on a
    CPU torch has no fused kernel for that)."""
    dropouts: int = 0
    """Dropouts over the hidden state that draw something."""


@dataclass(frozen=True)
class ModelShape:
    """What decides the memory of a training."""

    parameters: int
    embeddings: int
    """Of `parameters`: input embeddings, positions and the head: what no adapter and no 4-bit form touches."""
    layers: int
    hidden: int
    intermediate: int
    heads: int
    q_width: int
    kv_width: int
    vocabulary: int
    context: int
    layer: Layer
    tied: bool
    causal: bool = True
    window: int | None = None
    """Tokens that a layer looks back over, where that is not all of them."""
    windowed: int = 0
    """Layers that have the window."""

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.layer.linears


def read_shape(config: Config) -> ModelShape | None:
    """None: not one of the architectures known here, or a config that lacks what it should say."""
    reader = _READERS.get(str(config.get("model_type", "")))
    try:
        return reader(config) if reader else None
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _gated(config: Config) -> ModelShape:
    """Llama, Mistral, Qwen, Gemma, SmolLM3: gated MLP, grouped keys, RMS norms."""
    kind, hidden, layers = str(config["model_type"]), int(config["hidden_size"]), int(config["num_hidden_layers"])
    intermediate, heads = int(config["intermediate_size"]), int(config["num_attention_heads"])
    vocabulary, gemma = int(config["vocab_size"]), kind.startswith("gemma")
    width = int(config.get("head_dim") or _HEAD_DIM.get(kind) or hidden // heads)
    q_width, kv_width = width * heads, width * int(config.get("num_key_value_heads") or heads)
    layer = Layer(
        linears=(
            Linear(hidden, q_width),
            *[Linear(hidden, kv_width)] * 2,
            Linear(q_width, hidden),
            *[Linear(hidden, intermediate)] * 2,
            Linear(intermediate, hidden),
        ),
        nonlinear=3,
        norms=4 if kind in ("gemma2", "gemma3_text") else 2,
        wide_norm=gemma,
        head_norms=kind in ("qwen3", "gemma3_text"),
        scores="capped" if kind == "gemma2" else _dropped(config.get("attention_dropout")),
    )
    weights = _weights(layer.linears) + layer.norms * hidden + (2 * width if layer.head_norms else 0)
    tied = bool(config.get("tie_word_embeddings", gemma or kind == "smollm3"))
    embeddings = vocabulary * hidden * (1 if tied else 2)
    total = layers * (weights + _gated_biases(config, layer.linears)) + hidden + embeddings
    context = int(config.get("max_position_embeddings", 4096))
    sizes = (layers, hidden, intermediate, heads, q_width, kv_width, vocabulary, context)
    return ModelShape(total, embeddings, *sizes, layer, tied, True, *_window(config, layers))


def _window(config: Config, layers: int) -> tuple[int | None, int]:
    """(tokens, layers that have it)."""
    kind = config["model_type"]
    if not config.get("sliding_window") or not config.get("use_sliding_window", kind not in _WINDOW_ON_REQUEST):
        return None, 0
    types = config.get("layer_types")
    whole = layers // int(config.get("sliding_window_pattern", 6)) if kind == "gemma3_text" else 0
    return int(config["sliding_window"]), types.count("sliding_attention") if types else layers - whole


def _gated_biases(config: Config, linears: tuple[Linear, ...]) -> int:
    outputs = [linear.outputs for linear in linears]
    if config["model_type"] == "qwen2":
        return sum(outputs[:3])  # query, key, value; always
    attention = sum(outputs[:4]) if config.get("attention_bias") else 0
    return attention + (sum(outputs[4:]) if config.get("mlp_bias") else 0)


def _gpt2(config: Config) -> ModelShape:
    hidden, layers, vocabulary = int(config["n_embd"]), int(config["n_layer"]), int(config["vocab_size"])
    context, intermediate = int(config.get("n_positions", 1024)), int(config.get("n_inner") or 4 * hidden)
    layer = Layer(
        linears=(
            Linear(hidden, 3 * hidden),
            Linear(hidden, hidden),
            Linear(hidden, intermediate),
            Linear(intermediate, hidden),
        ),
        nonlinear=4 if config.get("activation_function", "gelu_new") == "gelu_new" else 1,
        norms=2,
        rms=False,
        scores=_dropped(config.get("attn_pdrop", 0.1)),
        dropouts=2 if config.get("resid_pdrop", 0.1) else 0,
    )
    weights = _weights(layer.linears) + sum(linear.outputs for linear in layer.linears) + 4 * hidden
    embeddings = (vocabulary + context) * hidden
    total = layers * weights + embeddings + 2 * hidden
    sizes = (layers, hidden, intermediate, int(config["n_head"]), hidden, hidden, vocabulary, context)
    return ModelShape(total, embeddings, *sizes, layer, tied=True)


def _bert(config: Config) -> ModelShape:
    """With the pooler, as a classifier has it; without the head."""
    hidden, layers, vocabulary = int(config["hidden_size"]), int(config["num_hidden_layers"]), int(config["vocab_size"])
    intermediate, context = int(config["intermediate_size"]), int(config.get("max_position_embeddings", 512))
    layer = Layer(
        linears=(*[Linear(hidden, hidden)] * 4, Linear(hidden, intermediate), Linear(intermediate, hidden)),
        nonlinear=1,
        norms=2,
        rms=False,
        scores=_dropped(config.get("attention_probs_dropout_prob", 0.1)),
        dropouts=2 if config.get("hidden_dropout_prob", 0.1) else 0,
    )
    weights = _weights(layer.linears) + sum(linear.outputs for linear in layer.linears) + 4 * hidden
    embeddings = (vocabulary + context + int(config.get("type_vocab_size", 2))) * hidden
    total = layers * weights + embeddings + 2 * hidden + hidden * hidden + hidden
    heads = int(config["num_attention_heads"])
    sizes = (layers, hidden, intermediate, heads, hidden, hidden, vocabulary, context)
    return ModelShape(total, embeddings, *sizes, layer, tied=True, causal=False)


def _dropped(probability: Any) -> str:
    return "dropped" if probability else "none"


def _weights(linears: tuple[Linear, ...]) -> int:
    return sum(linear.inputs * linear.outputs for linear in linears)


_HEAD_DIM = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
"""Where a config may leave it out; elsewhere the hidden size divided by the heads."""
_WINDOW_ON_REQUEST = ("qwen2", "qwen3", "smollm3")
_GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3")
_READERS: dict[str, Callable[[Config], ModelShape]] = {
    **dict.fromkeys(_GATED, _gated),
    "gpt2": _gpt2,
    "bert": _bert,
    "roberta": _bert,
    "xlm-roberta": _bert,
}
