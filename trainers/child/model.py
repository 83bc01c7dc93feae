"""Loads what a run trains: the base model with a LoRA adapter, or all of its weights; and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.child.chat import CHATML
from trainers.child.deepspeed_config import zero_stage
from trainers.child.failure import TrainFailure
from trainers.child.lora import scale_early
from trainers.child.parted import numel, parted_loading, put_together
from trainers.config import TrainConfig

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
"""Of a checkpoint: where the run stood, and how it was trained."""


@dataclass(frozen=True)
class Loaded:
    """`precision`: bf16 or fp32, as resolved. `template_added`: the base had no chat template and got ChatML. `kernels`: whose
    norms, gated feed-forward layers and rotary embeddings it has, torch or liger (`trainers.child.kernels`)."""

    model: Any
    tokenizer: Any
    precision: str
    template_added: bool
    kernels: str = "torch"

    @property
    def context(self) -> int | None:
        """Tokens."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def count(self, *, trainable: bool = False) -> int:
        return sum(numel(p) for p in self.model.parameters() if p.requires_grad or not trainable)


def resolve_precision(config: TrainConfig) -> str:
    """A run that resumes on slots of another kind keeps the precision that it began with."""
    if config.precision != "auto":
        return config.precision
    if (begun := begun_with(config, "precision")) is not None:
        return begun
    if config.devices == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def begun_with(config: TrainConfig, what: str) -> str | None:
    """What its checkpoint says. None where there is no checkpoint, or none that can be read; who resumes from that says so."""
    if config.resume_from is None:
        return None
    try:
        state = json.loads((Path(config.resume_from) / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get(what) if isinstance(state, dict) else None


def load(config: TrainConfig, device: str) -> Loaded:
    """The model as the run finds it: at a checkpoint when it resumes, else with the adapter to continue from, or a new one
    drawn from the seed. Raises TrainFailure."""
    precision = resolve_precision(config)
    tokenizer, template_added = load_tokenizer(config.base_model)
    with parted_loading(config, precision):
        model = load_weights(weights_folder(config), precision, **quantized(config, device))
    if config.training_type != "qlora":  # which is where it belongs already
        model.to(device)
    return Loaded(adapt(model, config), tokenizer, precision, template_added)


def weights_folder(config: TrainConfig) -> str:
    """Where all weights come from that no adapter holds."""
    if config.training_type == "full" and config.resume_from:
        return config.resume_from
    start = Path(config.adapter) if config.adapter else None
    return str(start) if start is not None and not _is_adapter(start) else config.base_model


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapt(model: Any, config: TrainConfig, **lora: Any) -> Any:
    """With what is to be trained: an adapter (`lora`: more fields of its configuration), or all weights."""
    adapted = _full(model, config) if config.training_type == "full" else scale_early(_lora(model, config, **lora))
    if config.hyperparams.gradient_checkpointing:
        _recompute(adapted, parted=zero_stage(config) == 3)
    return adapted


def _recompute(model: Any, parted: bool) -> None:
    """Each layer keeps its input only (arXiv:1604.06174). What is saved of parted weights is empty when a layer is computed again,
    which only torch's older way bears; that one needs an input with a gradient."""
    if not model.supports_gradient_checkpointing:
        message = "gradient_checkpointing does not work with this model: its layers cannot be computed again."
        raise TrainFailure("gradient_checkpointing_unsupported", message, hint="Leave gradient_checkpointing out.")
    # the method's name changed in transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": parted})
    if parted:
        model.enable_input_require_grads()


def load_tokenizer(folder: str) -> tuple[Any, bool]:
    """(tokenizer, whether ChatML was added)."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if tokenizer.chat_template:
        return tokenizer, False
    tokenizer.chat_template = CHATML
    return tokenizer, True


def quantized(config: TrainConfig, device: str) -> dict[str, Any]:
    """How `from_pretrained` is told to put the base into 4 bits (NF4, arXiv:2305.14314). Raises TrainFailure where that cannot
    be done."""
    if config.training_type != "qlora":
        return {}
    missing = "bitsandbytes is not in the environment" if importlib.util.find_spec("bitsandbytes") is None else None
    reason = "it needs a GPU" if device == "cpu" else missing
    if reason is not None:
        hint = "Use training_type lora, or run it on a GPU in an environment with `bitsandbytes` under pip."
        raise TrainFailure("qlora_unsupported", f"qlora cannot be trained here: {reason}.", hint=hint)
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if resolve_precision(config) == "bf16" else torch.float32,
    )
    return {"quantization_config": four_bits, "device_map": {"": device}}


def load_weights(folder: str, precision: str, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model in the run's precision, a causal one unless `kind` is another Auto class; safetensors only, since other formats
    run code when they are read."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # the name of the argument changed in transformers 4.56
    key = "dtype" if _version() >= (4, 56) else "torch_dtype"
    try:
        return kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, **{key: dtype}, **options)
    except (OSError, ValueError) as error:
        hint = "Add the base model again; `heliostat base-model add` checks what it takes."
        raise TrainFailure(
            "model_not_loadable", f"The base model cannot be loaded: {error}", hint=hint, fixable_by="operator"
        ) from error


def _version() -> tuple[int, int]:
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def _lora(model: Any, config: TrainConfig, **more: Any) -> Any:
    start = config.resume_from or config.adapter
    if start:
        try:
            return PeftModel.from_pretrained(model, start, is_trainable=True, autocast_adapter_dtype=False)
        except RuntimeError as error:  # other shapes
            raise TrainFailure(
                "adapter_does_not_fit",
                f"The adapter to go on from does not fit this model and these rows: {error}",
                hint="Start from the base model; a classifier can be continued with the same labels only.",
            ) from error
    hyper = config.hyperparams
    torch.manual_seed(hyper.seed)  # the same adapter on every rank
    lora = LoraConfig(
        r=hyper.lora_r,
        lora_alpha=hyper.lora_alpha,
        lora_dropout=hyper.lora_dropout,
        target_modules=hyper.target_modules or "all-linear",
        use_rslora=hyper.use_rslora,
        **{"task_type": "CAUSAL_LM", **more},
    )
    try:
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        hint = "Check target_modules against the names of the model's layers, or leave it out."
        raise TrainFailure("lora_not_applicable", f"LoRA does not fit this model: {error}", hint=hint) from error


def _full(model: Any, config: TrainConfig) -> Any:
    if config.adapter and not config.resume_from and _is_adapter(Path(config.adapter)):
        with put_together(model):
            model = PeftModel.from_pretrained(model, config.adapter).merge_and_unload()
    return model.requires_grad_(True)
