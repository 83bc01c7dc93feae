"""What one training run is told: resolved hyperparameters and places. Standard library only; shipped with the child.

The identity of a run is (this, the data, the seed, the world size, the threads per slot, the instruction set): the same identity
gives the same numbers, bit for bit. Another world size, and what shares out or saves memory, change their rounding only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional


@dataclass(frozen=True)
class Hyperparams:
    """Resolved: no "auto" is left but where None says so."""

    epochs: int = 3
    batch_size: int = 8
    """Global: rows per optimizer step over all ranks."""
    micro_batch_size: Optional[int] = None
    """Rows per forward pass and rank; None: chosen by the child (as large as the batch's share)."""
    lr: float = 2e-4
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: Optional[List[str]] = None
    """None: all linear layers but the head."""
    max_seq_len: Optional[int] = None
    """Tokens; None: the longest row, at most the model's context and 4096."""
    lr_scheduler: str = "cosine"
    """cosine, linear or constant; all after the warm-up."""
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    zero_stage: Optional[int] = None
    """What several ranks share out among them (arXiv:1910.02054): 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights
    too. None: 2."""
    offload: str = "none"
    """What is kept in the host's memory and not in the GPU's: none, optimizer, or parameters (and the optimizer; ZeRO-3)."""
    gradient_checkpointing: Optional[bool] = None
    """A layer keeps its input only and is computed again for the backward pass. None: no."""
    use_liger_kernel: Optional[bool] = None
    """Liger's kernels instead of torch's on GPUs (`trainers.child.kernels`). None: where they are installed and compute the same;
    True: so too, and where not, the log says why."""
    seed: int = 42
    max_steps: Optional[int] = None
    eval_steps: Optional[int] = None
    packing: Optional[bool] = None
    """Several rows in one sequence, none seeing another. None: wherever the architecture gives the same numbers that way."""
    validation_split: Optional[float] = None
    """The share of the rows that is not trained on but validated on; drawn from the seed."""
    overlength: str = "truncate"
    """truncate, drop or error."""
    use_rslora: bool = False
    """Scale the adapter by alpha/sqrt(r) instead of alpha/r (arXiv:2312.03732)."""
    beta: float = 0.1
    """Of `dpo`: how far the model may leave its reference (arXiv:2305.18290)."""
    early_stopping_patience: Optional[int] = None
    """Evaluations in a row without a lower validation loss, after which the run ends; evaluates once an epoch unless
    `eval_steps` says otherwise."""
    n_checkpoints: Optional[int] = None
    """So many of the last checkpoints stay, and the one with the lowest validation loss; None: all of them."""
    load_best_model_at_end: Optional[bool] = None
    """The artifact has the weights with the lowest validation loss instead of the last ones; evaluates once an epoch unless
    `eval_steps` says otherwise. None: with `early_stopping_patience`."""

    def held_out(self, rows: int) -> int:
        """How many of so many rows are validated on and not trained on; where there are two, each side has one."""
        if not self.validation_split:
            return 0
        return max(0, min(max(1, round(self.validation_split * rows)), rows - 1))


@dataclass(frozen=True)
class TrainConfig:
    base_model: str
    """Folder with config.json, safetensors, tokenizer (with a chat template)."""
    train_file: str
    """Canonical rows, JSON lines: {"messages":[{"role","content","weight"?}…]} or {"prompt":str,"completion":str} or {"text":str};
    for `dpo` {"prompt"?,"chosen","rejected"}, for classification {"text","label"}."""
    output_dir: str
    """Gets `checkpoints/step-<8 digits>/`, `artifact/`."""
    validation_file: Optional[str] = None
    adapter: Optional[str] = None
    """Folder of a LoRA adapter, or of a checkpoint's weights, to start from (continue training)."""
    method: str = "sft"
    """sft, dpo or custom."""
    task: str = "causal_lm"
    """causal_lm, or sequence_classification (with the method sft)."""
    training_type: str = "lora"
    """lora, qlora (the base in 4 bits; on a GPU) or full."""
    hyperparams: Hyperparams = field(default_factory=Hyperparams)
    precision: str = "auto"
    """auto (bf16 where the processor or GPU has it, else fp32), bf16, fp32."""
    world_size: int = 1
    first_rank: int = 0
    """Of the ranks on this node, whose numbers follow one another."""
    node_ranks: Optional[int] = None
    """How many of the ranks are on this node; None: all of them."""
    meeting_point: Optional[str] = None
    """host:port on the node of rank 0, where ranks of several nodes meet; None: a free port of this node."""
    devices: str = "cpu"
    """`cpu`, or `cuda` (rank i uses the i-th visible GPU)."""
    threads_per_slot: int = 1
    checkpoint_every_s: float = 60.0
    keep_checkpoints: int = 2
    """How many durable checkpoints stay in `output_dir`."""
    resume_from: Optional[str] = None
    """Folder of a checkpoint made by the same identity, by as many ranks or not."""
    exact_match_rows: int = 200
    """How many validation rows are answered greedily before and after; 0: none."""
    max_new_tokens: int = 64
    sample_rows: int = 3
    memory_limit_gb: Optional[float] = None
    """GiB per slot; on `cpu` the process's memory above what the imports take."""
    cache_dir: Optional[str] = None
    """Folder of the tenant's own, kept between runs: rows as tokens. None: nothing is kept."""
    metadata: Dict[str, Any] = field(default_factory=dict)
    """Goes into the artifact's README as lineage."""
    entrypoint: Optional[List[str]] = None
    """Of `custom`: what the tenant's Python is started with: a file and its arguments, or -m, a module and its arguments."""
    code: Optional[str] = None
    """Of `custom`: the folder that the script is started in."""
    params: Dict[str, Any] = field(default_factory=dict)
    """Of `custom`: whatever its script wants to be told."""
    best_checkpoint: Optional[str] = None
    """Weights of the checkpoint that had the lowest validation loss before `resume_from`, where that is another one."""
    outputs: List[str] = field(default_factory=list)
    """More forms of the model beside it in the artifact: merged, gguf, curves, tensorboard; what cannot be made is left out with a
    warning."""
    collective_timeout_s: float = 600.0
    """How long the ranks wait for one that says nothing any more; below the scheduler's own limit for a job without progress."""

    @property
    def spans_nodes(self) -> bool:
        return self.ranks_here < self.world_size

    @property
    def ranks_here(self) -> int:
        return self.world_size if self.node_ranks is None else self.node_ranks

    def to_dict(self) -> Dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Dict[str, Any]) -> TrainConfig:
        """Raises TypeError for an unknown or missing key."""
        return cls(**{**data, "hyperparams": Hyperparams(**data.get("hyperparams", {}))})


LAUNCHERS = {"custom": "trainers.child.custom.conductor"}


def launcher_of(method: str) -> str:
    """The module that is the first process of such a run; what it is told and answers is in `trainers.protocol`."""
    return LAUNCHERS.get(method, "trainers.child.launcher")
