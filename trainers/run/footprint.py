"""What the training code holds in memory at its peak, part by part, for one slot. Pure: sizes of a model and a way of training.

Follows what `trainers.child` and torch's autograd keep: weights, gradients and optimizer as in arXiv:1910.02054 §3; of each
layer the tensors that its backward pass reads, counted one by one (`benchmarks/memory.py` holds them against what is measured)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainers.run.architectures import ModelShape

GIB = 1024**3
MIB = 1024**2
DEFAULT_SEQ_LEN = 2048
"""Assumed where the longest row is not known."""

CUDA_CONTEXT_BYTES = int(0.8 * GIB)
CPU_RUNTIME_BYTES = 64 * MIB
"""What the first use of tokenizer, torch's kernels and the optimizer brings into a process that has done its imports."""
PIECE_TOKENS = 512
"""Of one forward pass where rows are packed, as `trainers.child.packing` has it."""
HEAD_CHUNK = 1 << 24
"""How many logits exist at once, as `trainers.child.head` has it."""
ANSWERED = 16
"""Questions that an evaluation answers side by side, as `trainers.child.evaluate` has it."""
BUCKET = 1 << 25
"""Elements of the buffer for gradients on their way, ZeRO 1 and 2, as `trainers.child.deepspeed_config` has it."""
HELD_BACK = {4: 0.9, 2: 0.7}
"""By the width of a number: of what a step frees, the share that the C library's allocator does not give again to the next
that asks. torch aligns its tensors, and glibc before 2.38 does not find aligned room again. A process with a memory limit asks
the kernel instead."""
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "buffers",
    "allocator",
    "context",
    "rule",
)
"""What an estimate may name, in the order in which people read it."""


@dataclass(frozen=True)
class Training:
    """The way of training, as far as memory depends on it."""

    method: str = "sft"
    """sft, dpo or custom (taken for sft)."""
    task: str = "causal_lm"
    """causal_lm or sequence_classification."""
    training_type: str = "lora"
    """lora, qlora or full."""
    precision: str = "bf16"
    """`auto` counts as bf16."""
    seq_len: int = DEFAULT_SEQ_LEN
    micro_batch: int = 1
    """Rows in one forward pass; 1 is the smallest that works, and the micro-batch is ours to choose."""
    batch_size: int | None = None
    """Rows of one step over all slots; None: so many that gradients are summed over several forward passes."""
    validation_len: int = 0
    """Tokens of the longest row that is not trained on but evaluated, and whose question is answered; 0: there is none."""
    packing: bool = True
    """Short rows share a forward pass, where the architecture allows it."""
    lora_r: int = 16
    zero_stage: int = 2
    """Of DeepSpeed, when there is more than one slot."""
    offload: str = "none"
    """To the host's memory: none, optimizer, or parameters (these and the optimizer; ZeRO-3)."""
    checkpointing: bool = False
    """A layer keeps its input only and is computed again for the backward pass."""
    slots: int = 1
    on_cpu: bool = False
    bounded: bool = True
    """On a CPU: whether the run has a memory limit, with which freed memory goes back at once (`trainers.child.memory`)."""

    @property
    def width(self) -> int:
        """Bytes of a number in the forward pass."""
        return 4 if self.precision == "fp32" else 2

    @property
    def parted(self) -> bool:
        """Whether a slot has a part of the weights only."""
        return self.offload == "parameters" or (self.zero_stage >= 3 and self.slots > 1)

    @property
    def adapts(self) -> bool:
        return self.training_type != "full"

    @property
    def packs(self) -> bool:
        short = self.method != "dpo" or self.seq_len <= PIECE_TOKENS
        return self.packing and short and self.task == "causal_lm"

    @property
    def share(self) -> int | None:
        """Rows of one step on one slot."""
        return None if self.batch_size is None else math.ceil(self.batch_size / self.slots)


def footprint(shape: ModelShape, training: Training) -> dict[str, int]:
    """Bytes by part at the moment that needs most: the loss, the last or the first layer's backward pass, or the update."""
    peak = max(_moments(shape, training), key=lambda parts: sum(parts.values()))
    steady = {
        "weights": _weights(shape, training),
        "optimizer": _optimizer(shape, training),
        "context": CPU_RUNTIME_BYTES if training.on_cpu else CUDA_CONTEXT_BYTES,
    }
    if training.slots > 1 or training.parted:
        steady["buffers"] = _buffers(shape, training)
    if training.on_cpu and not training.bounded:
        steady["allocator"] = int(HELD_BACK[training.width] * (peak["activations"] + peak["workspace"]))
    return steady | peak


def trainable(shape: ModelShape, training: Training) -> int:
    """Numbers that are trained."""
    if not training.adapts:
        return total(shape, training)
    return shape.layers * training.lora_r * sum(linear.inputs + linear.outputs for linear in shape.linears)


def total(shape: ModelShape, training: Training) -> int:
    """A classifier made from a causal model has no output matrix."""
    headless = training.task == "sequence_classification" and shape.causal and not shape.tied
    return shape.parameters - (shape.vocabulary * shape.hidden if headless else 0)


def tokens_per_pass(shape: ModelShape, training: Training) -> int:
    """Of one forward pass, at most. DPO computes both answers of a pair together."""
    rows = training.micro_batch if training.share is None else min(training.micro_batch, training.share)
    tokens = rows * training.seq_len
    if training.packs and shape.causal:  # what cannot be packed goes as many tokens to a pass
        room = training.seq_len * (training.share or PIECE_TOKENS)
        tokens = max(tokens, training.seq_len, min(PIECE_TOKENS, room))
    return tokens * (2 if training.method == "dpo" else 1)


def _packs(shape: ModelShape, training: Training) -> bool:
    """Whether several rows may be one sequence; beyond its window an architecture cannot."""
    return training.packs and shape.causal and not _beyond_window(shape, training)


def _beyond_window(shape: ModelShape, training: Training) -> bool:
    return shape.window is not None and training.seq_len > shape.window


def _moments(shape: ModelShape, training: Training) -> list[dict[str, int]]:
    tokens, gradients = tokens_per_pass(shape, training), _gradients(shape, training)
    kept, layer_work = _activations(shape, training, tokens), _layer_work(shape, training, tokens)
    again = _one_layer(shape, training, tokens) + _window_mask(shape, training) if training.checkpointing else 0
    several = _passes(shape, training, tokens) > 1
    first = 0 if training.adapts else min(gradients, _head_bytes(shape, training))
    logits, head_work = _head(shape, training, tokens)
    before = gradients if several or training.adapts else 0
    return [
        _parts(before, kept, logits, head_work),
        _parts(max(before, first), kept + again, logits, layer_work),
        _parts(gradients, kept // shape.layers + again, 0, layer_work + first),
        _update(shape, training),
        *([_evaluation(shape, training)] if training.validation_len else []),
    ]


def _evaluation(shape: ModelShape, training: Training) -> dict[str, int]:
    """Keys and values of questions as long as the longest row, and one layer over all of them at once."""
    tokens = ANSWERED * training.validation_len
    answers = shape.causal and training.task == "causal_lm"
    keys = tokens * shape.layers * 2 * shape.kv_width * training.width if answers else 0
    one_layer = training.width * max(3 * shape.intermediate, 4 * shape.q_width) + 8 * shape.hidden
    return _parts(0, keys, 0, tokens * one_layer)


def _parts(gradients: int, activations: int, logits: int, workspace: int) -> dict[str, int]:
    return {"gradients": gradients, "activations": activations, "logits": logits, "workspace": workspace}


def _passes(shape: ModelShape, training: Training, tokens: int) -> int:
    if training.share is None:
        return 2
    return math.ceil(training.share * training.seq_len * (2 if training.method == "dpo" else 1) / tokens)


def _weights(shape: ModelShape, training: Training) -> int:
    if training.offload == "parameters":
        return 0
    held = total(shape, training) * training.width
    if training.training_type == "qlora":
        linear = shape.layers * sum(one.inputs * one.outputs for one in shape.linears)
        # 4 bits, and the scale of 64 numbers in 8 bits (arXiv:2305.14314 §3)
        held += int(linear * (0.5 + 1 / 64)) - linear * training.width
    if training.adapts:
        held += trainable(shape, training) * training.width
    return held // _divided(training, 3)


def _gradients(shape: ModelShape, training: Training) -> int:
    return trainable(shape, training) * training.width // _divided(training, 2)


def _optimizer(shape: ModelShape, training: Training) -> int:
    """AdamW's two moments, and the fp32 masters of weights that are trained in bf16."""
    if training.offload != "none":
        return 0
    masters = 4 if training.width == 2 else 0
    return trainable(shape, training) * (8 + masters) // _divided(training, 1)


def _divided(training: Training, stage: int) -> int:
    return training.slots if training.zero_stage >= stage else 1


def _update(shape: ModelShape, training: Training) -> dict[str, int]:
    """Gradients in fp32; the fused AdamW computes in registers."""
    gradients = 0 if training.offload != "none" else trainable(shape, training) * 4 // _divided(training, 1)
    return _parts(gradients, 0, 0, 0)


def _buffers(shape: ModelShape, training: Training) -> int:
    layer = sum(one.inputs * one.outputs for one in shape.linears)
    used = min(BUCKET, trainable(shape, training)) if training.on_cpu else BUCKET
    gathered = 2 * layer + shape.embeddings if training.parted else 0
    return (used + gathered) * training.width


def _activations(shape: ModelShape, training: Training, tokens: int) -> int:
    """What a forward pass leaves."""
    ends = 4 * shape.hidden + (0 if training.adapts else 2 * training.width * shape.hidden)
    mask = tokens * tokens * (training.width + 1) if _packs(shape, training) else 0
    inputs = tokens * training.width * shape.hidden
    each = inputs if training.checkpointing else _one_layer(shape, training, tokens)
    masks = 0 if training.checkpointing else shape.windowed * _window_mask(shape, training)
    return shape.layers * each + tokens * ends + mask + masks


def _window_mask(shape: ModelShape, training: Training) -> int:
    """Of one layer: torch makes numbers of what may be seen, for each layer anew. gemma2 adds it to its scores."""
    if shape.layer.scores == "capped" or not _beyond_window(shape, training):
        return 0
    return training.seq_len**2 * training.width


def _one_layer(shape: ModelShape, training: Training, tokens: int) -> int:
    """What its backward pass reads."""
    return tokens * _kept_per_token(shape, training, tokens // max(1, tokens // training.seq_len))


def _kept_per_token(shape: ModelShape, training: Training, length: int) -> int:
    """Bytes of one layer. `length`: of the sequence that the token stands in."""
    layer, hidden, width = shape.layer, shape.hidden, training.width
    norms = layer.norms * hidden * (4 if layer.rms else width)
    if layer.rms and not training.adapts:
        norms += layer.norms * hidden * (4 if layer.wide_norm else width)
    if layer.head_norms:
        both = shape.q_width + shape.kv_width
        norms += both * 4 + (0 if training.adapts else both * (4 if layer.wide_norm else width))
    drawn = layer.dropouts * hidden * (width if training.on_cpu else 1)
    nonlinear = layer.nonlinear * width * shape.intermediate
    return norms + drawn + nonlinear + _linear_inputs(shape, training) + _attention(shape, training, length)


def _linear_inputs(shape: ModelShape, training: Training) -> int:
    """Those of the attention and of the MLP, and what the last linear of each reads. A frozen linear keeps nothing, its adapter
    the same input and its own."""
    inner = training.lora_r * len(shape.linears) if training.adapts else 0
    return training.width * (2 * shape.hidden + shape.q_width + shape.intermediate + inner)


def _attention(shape: ModelShape, training: Training, length: int) -> int:
    """Query, key, value and output of a fused attention, which keeps no scores; or scores and all where there is none."""
    layer, width = shape.layer, training.width
    if layer.scores == "capped":
        return 3 * width * shape.q_width + shape.heads * length * (8 if width == 4 else 2 * width + 4)
    if layer.scores == "dropped" and training.on_cpu:
        return 3 * 4 * shape.q_width + 12 * shape.heads * length
    # with a mask of its own torch wants as many keys and values as queries; its output is the next linear's input
    masked = _packs(shape, training) or _beyond_window(shape, training)
    keys = shape.q_width if masked else shape.kv_width
    return width * (shape.q_width + 2 * keys) + 4 * shape.heads


def _layer_work(shape: ModelShape, training: Training, tokens: int) -> int:
    """What lives for a moment while one layer is computed, forward or backward, beyond what the layer keeps in the end."""
    mlp = (2 if training.adapts else 3) * training.width * shape.intermediate
    attention = 16 * shape.q_width
    return tokens * max(mlp, attention + _score_work(shape, training, tokens))


def _score_work(shape: ModelShape, training: Training, tokens: int) -> int:
    kept = shape.layer.scores
    if kept == "none" or (kept == "dropped" and not training.on_cpu):
        return 0
    return 8 * shape.heads * (tokens // max(1, tokens // training.seq_len))


def _head_bytes(shape: ModelShape, training: Training) -> int:
    return shape.vocabulary * shape.hidden * training.width


def _head(shape: ModelShape, training: Training, tokens: int) -> tuple[int, int]:
    """(kept until the backward pass, needed for a moment) by the loss at every position."""
    if training.task == "sequence_classification" or not shape.causal:
        return 0, 0
    width, logits = training.width, tokens * shape.vocabulary
    if shape.layer.scores == "capped" or training.parted:  # logits that are capped too, or a parted head's, exist whole
        return logits * (4 + width), logits * (8 + 2 * width)
    chunk = 8 * min(HEAD_CHUNK, logits)
    kept = tokens * shape.hidden * width * (1 if training.adapts else 2)
    learns = 0 if training.adapts else shape.vocabulary * shape.hidden * (4 + width)
    return kept, chunk + learns
