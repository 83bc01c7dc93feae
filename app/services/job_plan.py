"""What a request means: the rows it refers to, resolved hyperparameters, shape and estimate. Reads, writes nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.ids import CHECKPOINT
from app.db.models import BaseModel, Checkpoint, Code, Dataset, Environment, Job, Model, ModelVersion, Node
from app.db.repository import Repository
from app.db.shapes import shapes_to_json
from app.schemas.finetune import FinetuneRequest
from app.services.hyperparams import (
    CLASSIFICATION,
    CUSTOM,
    ROWS,
    Way,
    refuse_gguf,
    refuse_what_changes_nothing,
    resolve,
    way_of,
)
from app.services.resources import Choice, ModelFacts, Rules, Wanted, choose
from app.services.scripts import ScriptPlan, choose_room, plan_script
from app.settings import Settings
from cluster.core.kinds import CPU
from cluster.errors import Conflict, InvalidRequest, NotFound
from trainers.config import Hyperparams
from trainers.run.architectures import read_shape
from trainers.run.memory import Ask, Training

MAX_AUTO_SEQ_LEN = 4096
CHARS_PER_TOKEN = 4
"""Of English text; a rough number, for estimates only."""


@dataclass(frozen=True)
class Plan:
    method: str
    training_type: str
    base: BaseModel
    parent: ModelVersion | None
    checkpoint: Checkpoint | None
    dataset: Dataset
    validation: Dataset | None
    environment: Environment | None
    hyperparams: Hyperparams
    choice: Choice
    script: ScriptPlan | None = None

    def estimate(self) -> dict[str, Any]:
        """Beside memory: how much there is to do; of a script, what the request says of it."""
        if self.script is not None:
            steps = self.script.params.get("max_steps")
            return {**self.choice.estimate.as_dict(), **({"steps": steps} if steps else {}), "rows": self.dataset.rows}
        epochs = self.hyperparams.epochs
        rows = self.dataset.rows - self.hyperparams.held_out(self.dataset.rows)
        steps = epochs * math.ceil(rows / self.hyperparams.batch_size)
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
        """Of a script, those that the request names: the defaults would be nobody's."""
        return asdict(self.hyperparams) if self.script is None else self.script.hyperparams

    def shape_dict(self) -> dict[str, Any]:
        return shapes_to_json(self.choice.shapes)


def make_plan(session: Session, tenant: str, request: FinetuneRequest, settings: Settings) -> Plan:
    """Raises every error that makes a request unacceptable but permissions and quotas."""
    way = way_of(request)
    refuse_what_changes_nothing(request, way)
    repository = Repository(session, tenant)
    if way.method == CUSTOM:
        return _script_plan(repository, request, way, settings)
    base, parent, checkpoint = _begins_with(repository, request.base_model, way)
    environment = _environment(repository, request.environment) if request.environment else None
    refuse_gguf(request, base.config or {}, environment.lock if environment else None)
    dataset = _dataset(repository, request.dataset_id, "dataset_id", way)
    other = request.validation_dataset_id
    validation = _dataset(repository, other, "validation_dataset_id", way) if other else None
    asked, hyperparams = request.hyperparams, resolve(request, way)
    _check_split(hyperparams, dataset)
    evaluated = validation or (dataset if hyperparams.validation_split else None)
    training = Training(
        method=way.method,
        training_type=way.training_type,
        task=way.task,
        precision="auto",
        batch_size=hyperparams.batch_size,
        packing=hyperparams.packing is not False,
        validation_len=sequence_length(hyperparams, evaluated.max_chars, base.config or {}) if evaluated else 0,
        seq_len=sequence_length(hyperparams, dataset.max_chars, base.config or {}),
        lora_r=hyperparams.lora_r,
        zero_stage=3 if hyperparams.offload == "parameters" else 2 if asked.zero_stage is None else asked.zero_stage,
        offload=hyperparams.offload,
        checkpointing=bool(asked.gradient_checkpointing),
    )
    ours = Ask(
        may_part=asked.zero_stage is None and way.training_type == "full",
        may_recompute=asked.gradient_checkpointing is None,
    )
    facts = ModelFacts(base.config or {}, base.parameters)
    choice = choose(request.resource_config, _nodes(session), facts, Wanted(training, ours), _rules(settings))
    choice = _without_idle_slots(hyperparams, _where_it_runs(way, hyperparams, choice))
    _check_budget(request, choice)
    hyperparams = replace(hyperparams, zero_stage=choice.zero_stage, gradient_checkpointing=choice.recomputes)
    if not training.packs:
        hyperparams = replace(hyperparams, micro_batch_size=choice.micro_batch)
    return Plan(
        method=way.method,
        training_type=way.training_type,
        base=base,
        parent=parent,
        checkpoint=checkpoint,
        dataset=dataset,
        validation=validation,
        environment=environment,
        hyperparams=hyperparams,
        choice=choice,
    )


def _script_plan(repository: Repository, request: FinetuneRequest, way: Way, settings: Settings) -> Plan:
    """Of a tenant's own script: it is given model, data and room, and decides everything else itself."""
    base, parent, checkpoint = _begins_with(repository, request.base_model, way)
    validation = request.validation_dataset_id
    script = plan_script(request, _code(repository, request.code) if request.code else None)
    facts = ModelFacts(base.config or {}, base.parameters)
    choice = choose_room(request, _nodes(repository.session), facts, _rules(settings).fallback)
    _check_budget(request, choice)
    return Plan(
        method=way.method,
        training_type=way.training_type,
        base=base,
        parent=parent,
        checkpoint=checkpoint,
        dataset=_dataset(repository, request.dataset_id, "dataset_id", way),
        validation=_dataset(repository, validation, "validation_dataset_id", way) if validation else None,
        environment=_environment(repository, request.environment) if request.environment else None,
        hyperparams=resolve(request, way),
        choice=choice,
        script=script,
    )


def sequence_length(hyperparams: Hyperparams, max_chars: int, config: dict[str, Any]) -> int:
    """Tokens of the longest row, at most: nobody tokenises here, and a token has at least one character."""
    shape = read_shape(config)
    context = shape.context if shape else MAX_AUTO_SEQ_LEN
    longest = hyperparams.max_seq_len or min(MAX_AUTO_SEQ_LEN, context)
    return max(8, min(longest, max_chars + 64))


def _rules(settings: Settings) -> Rules:
    fallback = settings.profile == "laptop" and settings.gpu_type_fallback == "any"
    return Rules(fallback, settings.training.max_nodes)


def _nodes(session: Session) -> list[Node]:
    return list(session.scalars(select(Node).where(Node.lost_at.is_(None)).order_by(Node.name)))


def _begins_with(
    repository: Repository, ref: str, way: Way
) -> tuple[BaseModel, ModelVersion | None, Checkpoint | None]:
    if not ref.startswith(CHECKPOINT):
        return *_base(repository, ref, way), None
    checkpoint = _named(repository.checkpoint, ref, "base_model")
    job = repository.job(checkpoint.job_id)
    if CUSTOM in (job.method, way.method):
        raise _unsupported(
            f"{ref} can only be continued by its own job: what a script makes of a checkpoint is its own business",
            "Start from the job's model, or from the base model.",
        )
    _check_task(ref, job, way)
    if (job.training_type == "full") != (way.training_type == "full"):
        raise _unsupported(
            f"{ref} is of a job with training_type {job.training_type} and can only be continued as such",
            "Use the same training_type, or start from the job's model once it is there.",
            param="training_type",
        )
    parent = repository.session.get(ModelVersion, job.parent_version_id) if job.parent_version_id else None
    stands_on = parent if parent is not None and parent.kind == "model" else None
    if stands_on is not None and stands_on.deleted_at is not None:
        raise NotFound(
            f"the tuned model that {ref} stands on was deleted", code="base_model_not_found", param="base_model"
        )
    return repository.base_model(job.base_model_id), stands_on, checkpoint


def _base(repository: Repository, ref: str, way: Way) -> tuple[BaseModel, ModelVersion | None]:
    """A base model, or a tuned version to continue from with the base that it stands on."""
    try:
        base = repository.base_model(ref)
    except NotFound:
        return _tuned(repository, ref, way)
    if base.status != "ready":
        reason = f": {base.error['message']}" if base.error else ""
        raise Conflict(
            f"base model {base.name} is {base.status}, not ready{reason}",
            code="base_model_not_ready",
            param="base_model",
            hint="Wait until `heliostat base-model ls` shows it as ready, or name another one.",
        )
    if way.method != CUSTOM and way.task != CLASSIFICATION and _only_encodes(base.config or {}):
        raise InvalidRequest(
            f"base model {base.name} encodes text and writes none, so it can learn to classify only",
            code="base_model_not_causal",
            param="base_model",
            hint=f"Use task {CLASSIFICATION} with rows of text and label, or a causal language model.",
        )
    return base, None


def _only_encodes(config: dict[str, Any]) -> bool:
    """BERT and its like, as `trainers.child.convert` takes them."""
    architecture = next(iter(config.get("architectures") or []), "")
    return architecture.endswith(("ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "Model"))


def _tuned(repository: Repository, ref: str, way: Way) -> tuple[BaseModel, ModelVersion]:
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
    if way.method == CUSTOM:
        return repository.base_model(job.base_model_id), version
    if version.kind == "files":
        raise _unsupported(
            f"{ref[:120]} was made by a script, and is neither an adapter nor a model that can be trained on",
            "Use method custom, or start from the base model.",
        )
    _check_task(ref, job, way)
    if version.kind == "adapter" and (way.training_type == "full" or _stands_on_full(repository, job)):
        raise _unsupported(
            f"{ref[:120]} is an adapter that this version can only continue as lora on its own base model",
            "Use training_type lora, or start from the base model.",
        )
    return repository.base_model(job.base_model_id), version


def _check_task(ref: str, job: Job, way: Way) -> None:
    if job.task != way.task:
        raise _unsupported(
            f"{ref[:120]} was trained for the task {job.task}, the request is for {way.task}",
            f"Use task {job.task}, or start from the base model.",
        )


def _unsupported(message: str, hint: str, param: str = "base_model") -> InvalidRequest:
    return InvalidRequest(message, code="unsupported_continuation", param=param, hint=hint)


def _stands_on_full(repository: Repository, job: Job) -> bool:
    """Whether the adapter of this job was trained over weights other than the base model's."""
    if job.parent_version_id is None:
        return False
    parent = repository.session.get_one(ModelVersion, job.parent_version_id)
    return parent.kind == "model" or _stands_on_full(repository, repository.job(parent.job_id))


def _dataset(repository: Repository, ref: str, param: str, way: Way) -> Dataset:
    dataset = _named(repository.dataset, ref, param)
    # Shared: it cannot be deleted between this look and the insertion of the job.
    repository.session.refresh(dataset, with_for_update={"read": True})
    if dataset.deleted_at is not None:
        raise NotFound(f"dataset {ref[:120]!r} was deleted", code="dataset_not_found", param=param)
    if way.method != CUSTOM and dataset.task != way.rows:
        trains = {"preference": "method dpo", CLASSIFICATION: f"task {CLASSIFICATION}"}.get(dataset.task, "method sft")
        raise InvalidRequest(
            f"dataset {dataset.name} has rows with {ROWS[dataset.task]}, this training takes {ROWS[way.rows]}",
            code="dataset_task_mismatch",
            param=param,
            hint=f"Use {trains}, or another dataset.",
        )
    return dataset


def _check_split(hyperparams: Hyperparams, dataset: Dataset) -> None:
    if hyperparams.validation_split is not None and dataset.rows < 2:
        raise InvalidRequest(
            f"dataset {dataset.name} has one row, which cannot be split",
            code="invalid_value",
            param="validation_split",
            hint="Leave it out, or upload more rows.",
        )


def _where_it_runs(way: Way, hyperparams: Hyperparams, choice: Choice) -> Choice:
    """4-bit weights need a GPU's kernels; and on `cpu` slots all is in the host's memory anyway."""
    if way.training_type != "qlora" and hyperparams.offload == "none":
        return choice
    on_gpus = choice.only(lambda shape: CPU not in shape.kinds)
    if not on_gpus.options and hyperparams.offload != "none":
        raise InvalidRequest(
            "offload moves what a GPU holds to the host, and this job would run on cpu slots",
            code="invalid_value",
            param="hyperparams.offload",
            hint="Leave it out, or ask for a gpu_type that is here.",
        )
    if not on_gpus.options:
        raise InvalidRequest(
            "qlora needs a GPU, and this job would run on cpu slots",
            code="qlora_unsupported",
            param="training_type",
            hint="Use training_type lora, or ask for a gpu_type that is here.",
        )
    return on_gpus


def _code(repository: Repository, ref: str) -> Code:
    code: Code = _named(repository.code, ref, "code")
    # Shared: it cannot be deleted between this look and the insertion of the job.
    repository.session.refresh(code, with_for_update={"read": True})
    if code.deleted_at is not None:
        raise NotFound(f"code {ref[:120]!r} was deleted", code="code_not_found", param="code")
    return code


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
