"""From what a request says to resolved hyperparameters: which way of training, defaults by it, and what contradicts it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.schemas.finetune import FinetuneRequest
from app.schemas.finetune import Hyperparams as Asked
from app.services.scripts import check_fields
from cluster.errors import InvalidRequest
from trainers.config import Hyperparams

CAUSAL_LM, CLASSIFICATION, CUSTOM = "causal_lm", "sequence_classification", "custom"
ROWS = {
    "causal_lm": "messages, prompt and completion, or text",
    "preference": "prompt, chosen and rejected",
    "sequence_classification": "text and label",
}
"""The tasks that datasets are for, and what their rows hold."""
GGUF_MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""As `trainers.child.outputs.to_gguf` writes them."""


@dataclass(frozen=True)
class Way:
    """How to train what."""

    method: str
    training_type: str
    task: str

    @property
    def rows(self) -> str:
        """The task of a dataset that this trains on."""
        return "preference" if self.method == "dpo" else self.task

    @property
    def lr(self) -> float:
        """The default of its learning rate."""
        if self.method == "dpo":
            return 1e-6 if self.training_type == "full" else 5e-6
        return 2e-5 if self.training_type == "full" else 2e-4


def way_of(request: FinetuneRequest) -> Way:
    """`lora`, `qlora` and `full` are also accepted as `method`. Raises `InvalidRequest`."""
    method, training_type = str(request.method), str(request.training_type or "") or None
    if method in ("lora", "qlora", "full"):
        if training_type not in (None, method):
            raise _conflict("training_type", f"method {method} and training_type {training_type} contradict each other")
        method, training_type = "sft", method
    if method == CUSTOM:
        check_fields(request)
        return Way(method, "full", request.task)
    if method == "dpo" and request.task != CAUSAL_LM:
        raise _conflict("task", f"method dpo trains the task {CAUSAL_LM}, not {request.task}")
    return Way(method, training_type or "lora", request.task)


def refuse_what_changes_nothing(request: FinetuneRequest, way: Way) -> None:
    """A field that would change nothing is refused, not ignored. Raises `InvalidRequest`."""
    asked = request.hyperparams
    validates = request.validation_dataset_id is not None or request.validation_split is not None
    if way.method == CUSTOM:  # of the rest a script may make what it likes
        if request.outputs is not None:
            raise _idle("outputs", "method sft and dpo")
        return
    for field in ("entrypoint", "code", "params"):
        if getattr(request, field) is not None:
            raise _idle(field, "method custom")
    if asked.beta is not None and way.method != "dpo":
        raise _idle("hyperparams.beta", "method dpo")
    if asked.packing and way.task != CAUSAL_LM:
        raise _idle("hyperparams.packing", f"task {CAUSAL_LM}")
    if asked.use_rslora and way.training_type == "full":
        raise _idle("hyperparams.use_rslora", "training_type lora and qlora")
    if asked.early_stopping_patience is not None and not validates:
        raise _idle("hyperparams.early_stopping_patience", "a validation_dataset_id or a validation_split")
    if asked.offload == "parameters" and asked.zero_stage not in (None, 3):
        raise _conflict("hyperparams.zero_stage", "offload parameters is ZeRO-3, zero_stage says otherwise")
    if way.training_type == "qlora" and (asked.zero_stage == 3 or asked.offload == "parameters"):
        raise _conflict("hyperparams.zero_stage", "the 4-bit weights of qlora cannot be parted, which ZeRO-3 does")
    if asked.load_best_model_at_end and not validates:
        raise _idle("hyperparams.load_best_model_at_end", "a validation_dataset_id or a validation_split")
    _refuse_outputs(request, way)
    if request.validation_dataset_id is not None and request.validation_split is not None:
        raise _conflict("validation_split", "validation_dataset_id and validation_split both say what to validate on")


def _refuse_outputs(request: FinetuneRequest, way: Way) -> None:
    outputs = request.outputs or []
    adapts = way.training_type != "full"
    if ("merged" in outputs or "adapter" in outputs) and not adapts:
        raise _idle("outputs", "training_type lora and qlora: a full training leaves a whole model")
    if {"merged", "gguf"} & set(outputs) and way.task != CAUSAL_LM:
        raise _idle("outputs", f"task {CAUSAL_LM}")


def refuse_gguf(request: FinetuneRequest, base_config: dict[str, Any], lock: dict[str, Any] | None) -> None:
    """The child knows more reasons; these are known at once. `lock`: of the environment that was asked for. Raises
    `InvalidRequest`."""
    if "gguf" not in (request.outputs or []):
        return
    if lock and "conda" in lock and all(one["name"] != "gguf" for one in [*lock["conda"], *lock["pip"]]):
        raise InvalidRequest(
            f"environment {request.environment} is without the package gguf, which writes that output",
            code="output_unsupported",
            param="outputs",
            hint="Add gguf to the environment's packages, or take the output merged.",
        )
    model = base_config.get("model_type")
    if model not in GGUF_MODELS:
        raise InvalidRequest(
            f"a {model} model is not written as GGUF here, only {', '.join(GGUF_MODELS)} models are",
            code="output_unsupported",
            param="outputs",
            hint="Take the output merged; llama.cpp's convert_hf_to_gguf.py knows more architectures.",
        )


def resolve(request: FinetuneRequest, way: Way) -> Hyperparams:
    """Nothing is left open but what the child decides from the data."""
    asked: Asked = request.hyperparams
    given = asked.model_dump(exclude_none=True)
    if given.get("target_modules") == "all-linear":
        del given["target_modules"]
    return Hyperparams(**{"lr": way.lr, "validation_split": request.validation_split, **given})


def _conflict(param: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, code="conflicting_fields", param=param, hint="Give one of the two only.")


def _idle(param: str, owner: str) -> InvalidRequest:
    return InvalidRequest(
        f"{param} belongs to {owner}, and would change nothing here",
        code="invalid_value",
        param=param,
        hint=f"Leave it out, or use {owner}.",
    )
