"""The body of POST /finetune, exactly as users know it, and the job object that comes back."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.common import LABEL_PATTERN, Answer, Name, Reference, RequestBody, Text, small_json

JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Module = Annotated[Text, Field(min_length=1, max_length=200)]
Kind = Annotated[Text, Field(max_length=100)]


class Hyperparams(RequestBody):
    """Left out, null or "auto": the default. Synonyms: learning_rate, n_epochs, num_train_epochs, r, max_length …"""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "learning_rate": "lr",
        "n_epochs": "epochs",
        "num_train_epochs": "epochs",
        "num_epochs": "epochs",
        "train_batch_size": "batch_size",
        "global_batch_size": "batch_size",
        "r": "lora_r",
        "lora_rank": "lora_r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "rslora": "use_rslora",
        "max_length": "max_seq_len",
        "max_seq_length": "max_seq_len",
        "lr_scheduler_type": "lr_scheduler",
    }

    epochs: int | None = Field(None, ge=1, le=100)
    batch_size: int | None = Field(None, ge=1, le=4096, description="Global: rows per optimizer step.")
    lr: float | None = Field(None, gt=0, le=1)
    lora_r: int | None = Field(None, ge=1, le=512)
    lora_alpha: int | None = Field(None, ge=1, le=4096)
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    use_rslora: bool | None = Field(None, description="Scale the adapter by alpha/sqrt(r) instead of alpha/r.")
    target_modules: list[Module] | Literal["all-linear"] | None = None
    max_seq_len: int | None = Field(None, ge=8, le=1_048_576)
    lr_scheduler: Literal["cosine", "linear", "constant"] | None = None
    warmup_ratio: float | None = Field(None, ge=0, le=1)
    weight_decay: float | None = Field(None, ge=0, le=1)
    max_grad_norm: float | None = Field(None, gt=0, le=1000)
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="DeepSpeed, with several GPUs. Left out: what fits."
    )
    offload: Literal["none", "optimizer", "parameters"] | None = Field(None, description="From the GPU to the host.")
    gradient_checkpointing: bool | None = Field(
        None, description="Computes layers twice to keep less. Left out: where it would not fit otherwise."
    )
    use_liger_kernel: bool | None = Field(
        None, description="Liger's kernels, on GPUs. Left out: where they are installed and compute the same."
    )
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    eval_steps: int | None = Field(None, ge=1, le=10_000_000)
    overlength: Literal["truncate", "drop", "error"] | None = None
    beta: float | None = Field(None, gt=0, le=10, description="For `dpo`.")
    packing: bool | None = Field(None, description="Several rows in one sequence. Left out: where it is exact.")
    early_stopping_patience: int | None = Field(
        None, ge=1, le=1000, description="Evaluations in a row without a lower validation loss, after which it ends."
    )
    n_checkpoints: int | None = Field(
        None, ge=1, le=100, description="The last so many stay, and the best one. Left out: all."
    )
    load_best_model_at_end: bool | None = Field(
        None, description="The weights with the lowest validation loss. Left out: with early_stopping_patience."
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value != "auto"} if isinstance(data, dict) else data


class ResourceConfig(RequestBody):
    gpu_type: Kind | Annotated[list[Kind], Field(min_length=1, max_length=20)] | None = Field(
        None, description="An accelerator's name in any case, or a list that is tried in order. Left out: any."
    )
    mem_limit_gb: float | None = Field(
        None, gt=0, le=100_000, description="The most memory that the job may use per GPU, GiB; enforced."
    )
    num_gpus: int | None = Field(None, ge=1, le=100_000)
    num_nodes: int | None = Field(
        None, ge=1, le=10_000, description="The most nodes that they may be spread over. Left out: one."
    )
    market: Literal["any", "on_demand", "spot"] | None = None
    max_runtime_hours: float | None = Field(None, gt=0, le=8760)
    region: Annotated[Text, Field(max_length=64)] | None = None


class Budget(RequestBody):
    """When one is used up, the job is paused at a checkpoint."""

    gpu_hours: float | None = Field(None, gt=0, le=1e9)
    usd: float | None = Field(None, gt=0, le=1e9)

    @model_validator(mode="after")
    def _not_empty(self) -> Budget:
        if self.gpu_hours is None and self.usd is None:
            raise PydanticCustomError("empty_budget", "give gpu_hours, usd or both")
        return self


class ResumeRequest(RequestBody):
    budget: Budget | None = Field(None, description="Replaces what it names of the job's budget.")


MetadataKey = Annotated[Text, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[Text, Field(max_length=512)]


Params = Annotated[dict[MetadataKey, JsonValue], AfterValidator(small_json)]


class FinetuneRequest(RequestBody):
    tenant_id: Annotated[Text, Field(min_length=1, max_length=64)] | None = None
    base_model: Reference
    dataset_id: Reference
    validation_dataset_id: Reference | None = None
    validation_split: float | None = Field(None, gt=0, lt=1)
    method: Literal["sft", "dpo", "custom", "lora", "qlora", "full"] = "sft"
    training_type: Literal["lora", "qlora", "full"] | None = None
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    hyperparams: Hyperparams = Field(default_factory=Hyperparams)
    resource_config: ResourceConfig = Field(default_factory=ResourceConfig)
    environment: Reference | None = None
    priority: Literal["urgent", "high", "normal", "low"] = "normal"
    output_model: Name | None = None
    suffix: Annotated[str, Field(pattern=LABEL_PATTERN)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    budget: Budget | None = None
    entrypoint: Annotated[Text, Field(max_length=1000)] | None = Field(
        None, description="For `custom`: what Python is started with, `train.py --lr 1e-4` or `-m package.train`."
    )
    code: Reference | None = Field(None, description="For `custom`: the uploaded code that the entrypoint lies in.")
    params: Params | None = Field(None, description="For `custom`: whatever the script wants to be told.")
    outputs: list[Literal["adapter", "merged", "gguf"]] | None = Field(
        None, max_length=3, description="More forms of the model beside it, made at the end of the training."
    )


class StatusDetails(Answer):
    state: str
    reason: str
    since: int
    position: int | None = None


class JobError(Answer):
    code: str
    message: str
    param: str | None = None
    hint: str | None = None
    fixable_by: str | None = None


class Job(Answer):
    """Times in Unix seconds. `model` and `training_file` are the other door's names for the same."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    tenant_id: str
    status: JobStatus
    status_details: StatusDetails
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_start: int | None
    estimated_finish: int | None
    base_model: str
    model: str
    dataset_id: str
    training_file: str
    validation_dataset_id: str | None
    environment: str | None
    environment_fingerprint: str
    code: str | None
    entrypoint: str | None
    params: dict[str, Any] | None
    method: str
    training_type: str
    task: str
    hyperparams: dict[str, Any]
    precision: str
    priority: str
    resource_config: dict[str, Any]
    granted: dict[str, Any] | None
    estimate: dict[str, Any]
    actual: dict[str, Any] | None
    budget: dict[str, Any] | None
    progress: dict[str, Any] | None
    error: JobError | None
    output_model: str
    fine_tuned_model: str | None
    attempt: int
    metadata: dict[str, Any]
    created_by: str


class Estimate(Answer):
    """What POST /finetune would do, without doing it."""

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    base_model: str
    dataset_id: str
    method: str
    training_type: str
    hyperparams: dict[str, Any]
    shape: dict[str, Any]
    estimate: dict[str, Any]
    warnings: list[str]
