"""From what a request says to resolved hyperparameters: defaults by kind of training, and what is not there yet."""

from __future__ import annotations

from app.schemas.finetune import FinetuneRequest
from app.schemas.finetune import Hyperparams as Asked
from cluster.errors import InvalidRequest
from trainers.config import Hyperparams

LR = {"lora": 2e-4, "full": 2e-5}
NOT_YET = ("packing", "early_stopping_patience", "n_checkpoints")
FIELDS_NOT_YET = ("validation_split", "entrypoint")


def method_and_type(request: FinetuneRequest) -> tuple[str, str]:
    """`lora`, `qlora` and `full` are also accepted as `method`. Raises `InvalidRequest`."""
    method, training_type = str(request.method), str(request.training_type or "") or None
    if method in ("lora", "qlora", "full"):
        if training_type not in (None, method):
            raise InvalidRequest(
                f"method {method} and training_type {training_type} contradict each other",
                code="conflicting_fields",
                param="training_type",
                hint="Give training_type only.",
            )
        method, training_type = "sft", method
    training_type = training_type or "lora"
    if method != "sft":
        raise _unsupported("method", method, "sft")
    if training_type == "qlora":
        raise _unsupported("training_type", training_type, "lora or full")
    if request.task != "causal_lm":
        raise InvalidRequest(
            f"task {request.task} cannot be trained by this version",
            code="unsupported_task",
            param="task",
            hint="Use task causal_lm, with the label as the completion.",
        )
    return method, training_type


def _unsupported(field: str, value: str, instead: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field} {value} cannot be trained by this version",
        code="unsupported_method",
        param=field,
        hint=f"Use {field} {instead}.",
    )


def refuse_what_is_not_there(request: FinetuneRequest) -> None:
    """A field that would change nothing is refused, not ignored."""
    asked = request.hyperparams.model_dump(exclude_none=True)
    named = [f"hyperparams.{field}" for field in NOT_YET if asked.get(field)]
    named += [field for field in FIELDS_NOT_YET if getattr(request, field) is not None]
    if named:
        raise InvalidRequest(
            f"{named[0]} is not supported by this version",
            code="unsupported_field",
            param=named[0],
            hint="Leave it out."
            if named[0] != "validation_split"
            else "Upload the rows as a dataset of their own and name it in validation_dataset_id.",
        )
    if "beta" in asked:
        raise InvalidRequest(
            "beta belongs to the method dpo",
            code="invalid_value",
            param="hyperparams.beta",
            hint="Leave it out for sft.",
        )


def resolve(asked: Asked, training_type: str) -> Hyperparams:
    """Nothing is left open but what the child decides from the data."""
    given = asked.model_dump(exclude_none=True, exclude={"beta", *NOT_YET})
    if given.get("target_modules") == "all-linear":
        del given["target_modules"]
    return Hyperparams(**{"lr": LR[training_type], **given})
