"""What a request means: the rows it refers to, resolved hyperparameters, shape and estimate. Reads, writes nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import BaseModel, Dataset, Environment, Job, Model, ModelVersion, Node
from app.db.repository import Repository
from app.db.shapes import shapes_to_json
from app.schemas.finetune import FinetuneRequest
from app.services.hyperparams import method_and_type, refuse_what_is_not_there, resolve
from app.services.resources import Choice, ModelFacts, choose
from app.settings import Settings
from cluster.errors import Conflict, InvalidRequest, NotFound
from trainers.config import Hyperparams
from trainers.run.architectures import read_shape
from trainers.run.memory import Training

MAX_AUTO_SEQ_LEN = 4096
CHARS_PER_TOKEN = 4
"""Of English text; a rough number, for estimates only."""


@dataclass(frozen=True)
class Plan:
    method: str
    training_type: str
    base: BaseModel
    parent: ModelVersion | None
    dataset: Dataset
    validation: Dataset | None
    environment: Environment | None
    hyperparams: Hyperparams
    choice: Choice

    def estimate(self) -> dict[str, Any]:
        """Beside memory: how much there is to do."""
        epochs = self.hyperparams.epochs
        steps = epochs * math.ceil(self.dataset.rows / self.hyperparams.batch_size)
        chars = self.dataset.report.get("chars", {}).get("total", 0)
        return {
            **self.choice.estimate.as_dict(),
            "steps": min(steps, self.hyperparams.max_steps or steps),
            "rows": self.dataset.rows,
            "tokens": epochs * chars // CHARS_PER_TOKEN,
        }

    @property
    def warnings(self) -> list[str]:
        return [*self.choice.warnings, *self.dataset.report.get("warnings", [])]

    def hyperparams_dict(self) -> dict[str, Any]:
        return asdict(self.hyperparams)

    def shape_dict(self) -> dict[str, Any]:
        return shapes_to_json(self.choice.shapes)


def make_plan(session: Session, tenant: str, request: FinetuneRequest, settings: Settings) -> Plan:
    """Raises every error that makes a request unacceptable but permissions and quotas."""
    method, training_type = method_and_type(request)
    refuse_what_is_not_there(request)
    repository = Repository(session, tenant)
    base, parent = _base(repository, request.base_model, training_type)
    dataset = _dataset(repository, request.dataset_id, "dataset_id")
    validation = request.validation_dataset_id
    hyperparams = resolve(request.hyperparams, training_type)
    training = Training(
        method=method,
        training_type=training_type,
        seq_len=sequence_length(hyperparams, dataset.max_chars, base.config or {}),
        lora_r=hyperparams.lora_r,
    )
    facts = ModelFacts(base.config or {}, base.parameters)
    fallback = settings.profile == "laptop" and settings.gpu_type_fallback == "any"
    choice = choose(request.resource_config, _nodes(session), facts, training, fallback)
    choice = _without_idle_slots(hyperparams, choice)
    _check_budget(request, choice)
    return Plan(
        method=method,
        training_type=training_type,
        base=base,
        parent=parent,
        dataset=dataset,
        validation=_dataset(repository, validation, "validation_dataset_id") if validation else None,
        environment=_environment(repository, request.environment) if request.environment else None,
        hyperparams=hyperparams,
        choice=choice,
    )


def sequence_length(hyperparams: Hyperparams, max_chars: int, config: dict[str, Any]) -> int:
    """Tokens of the longest row, at most: nobody tokenises here, and a token has at least one character."""
    shape = read_shape(config)
    context = shape.context if shape else MAX_AUTO_SEQ_LEN
    longest = hyperparams.max_seq_len or min(MAX_AUTO_SEQ_LEN, context)
    return max(8, min(longest, max_chars + 64))


def _nodes(session: Session) -> list[Node]:
    return list(session.scalars(select(Node).where(Node.lost_at.is_(None)).order_by(Node.name)))


def _base(repository: Repository, ref: str, training_type: str) -> tuple[BaseModel, ModelVersion | None]:
    """A base model, or a tuned version to continue from with the base that it stands on."""
    try:
        base = repository.base_model(ref)
    except NotFound:
        return _tuned(repository, ref, training_type)
    if base.status != "ready":
        reason = f": {base.error['message']}" if base.error else ""
        raise Conflict(
            f"base model {base.name} is {base.status}, not ready{reason}",
            code="base_model_not_ready",
            param="base_model",
            hint="Wait until `heliostat base-model ls` shows it as ready, or name another one.",
        )
    return base, None


def _tuned(repository: Repository, ref: str, training_type: str) -> tuple[BaseModel, ModelVersion]:
    try:
        version = repository.model_version(ref)
    except NotFound:
        near = repository.near(ref, BaseModel, Model)
        raise NotFound(
            f"base model {ref[:120]!r} does not exist, and no tuned model of this name either",
            code="base_model_not_found",
            param="base_model",
            hint=f"Did you mean `{near}`?"
            if near
            else "`heliostat base-model ls` and `heliostat models ls` show what there is.",
        ) from None
    # Shared: it cannot be deleted between this look and the insertion of the job.
    repository.session.refresh(version, with_for_update={"read": True})
    if version.deleted_at is not None:
        raise NotFound(f"model {ref[:120]!r} was deleted", code="base_model_not_found", param="base_model")
    job = repository.job(version.job_id)
    if version.kind == "adapter" and (training_type == "full" or _stands_on_full(repository, job)):
        raise InvalidRequest(
            f"{ref[:120]} is an adapter that this version can only continue as lora on its own base model",
            code="unsupported_continuation",
            param="base_model",
            hint="Use training_type lora, or start from the base model.",
        )
    return repository.base_model(job.base_model_id), version


def _stands_on_full(repository: Repository, job: Job) -> bool:
    """Whether the adapter of this job was trained over weights other than the base model's."""
    if job.parent_version_id is None:
        return False
    parent = repository.session.get_one(ModelVersion, job.parent_version_id)
    return parent.kind == "model" or _stands_on_full(repository, repository.job(parent.job_id))


def _dataset(repository: Repository, ref: str, param: str) -> Dataset:
    dataset = _named(repository.dataset, ref, param)
    # Shared: it cannot be deleted between this look and the insertion of the job.
    repository.session.refresh(dataset, with_for_update={"read": True})
    if dataset.deleted_at is not None:
        raise NotFound(f"dataset {ref[:120]!r} was deleted", code="dataset_not_found", param=param)
    if dataset.task == "preference":
        raise InvalidRequest(
            f"dataset {dataset.name} has preference rows, which train with the method dpo; this version has sft only",
            code="unsupported_method",
            param=param,
            hint="Use a dataset of messages, prompt and completion, or text.",
        )
    if dataset.task != "causal_lm":
        raise InvalidRequest(
            f"dataset {dataset.name} is for the task {dataset.task}, the request for causal_lm",
            code="dataset_task_mismatch",
            param=param,
            hint="Upload the rows with prompt and completion, or messages.",
        )
    return dataset


def _environment(repository: Repository, ref: str) -> Environment:
    return _named(repository.environment, ref, "environment")


def _named(find: Any, ref: str, param: str) -> Any:
    try:
        return find(ref)
    except NotFound as error:
        error.param = param
        raise


def _without_idle_slots(hyperparams: Hyperparams, choice: Choice) -> Choice:
    busy = choice.only(lambda shape: shape.slots <= hyperparams.batch_size)
    if not busy.options:
        raise InvalidRequest(
            f"batch_size {hyperparams.batch_size} leaves some of {choice.shapes[0].slots} GPUs without a row",
            code="invalid_value",
            param="hyperparams.batch_size",
            hint="Raise batch_size, or ask for fewer num_gpus.",
        )
    return busy


def _check_budget(request: FinetuneRequest, choice: Choice) -> None:
    """A limit that could never be reached is refused, not ignored."""
    if request.budget is not None and request.budget.usd is not None and not choice.priced:
        raise InvalidRequest(
            "a budget in USD cannot be kept: the nodes that may take this job name no price",
            code="price_unknown",
            param="budget.usd",
            hint="Use budget.gpu_hours; operators set a node's price with node.price_per_hour.",
        )
