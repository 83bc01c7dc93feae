"""Jobs of method `custom`: what of a request only they have, what Python is started with, and how much room the script gets."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from app.db.models import Code, Node
from app.schemas.finetune import FinetuneRequest
from app.services.resources import Choice, ModelFacts, candidates
from cluster.core.job import Shape
from cluster.core.kinds import CPU
from cluster.errors import InvalidRequest, ResourceError
from trainers.run.memory import GIB, MARGIN, PROCESS_GB, Estimate, rule_gb

MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
MAX_WORDS = 200
BYTES_PER_PARAMETER = 4
"""A model as it is loaded to answer; scripts say `mem_limit_gb` when they need more."""


@dataclass(frozen=True)
class ScriptPlan:
    """`params`: what the script is told, the named hyperparameters among it."""

    entrypoint: list[str]
    params: dict[str, Any]
    hyperparams: dict[str, Any]
    code: Code | None

    def as_row(self) -> dict[str, Any]:
        return {"entrypoint": self.entrypoint, "params": self.params}


def check_fields(request: FinetuneRequest) -> None:
    """What a custom job must say, and what would change nothing for it. Raises `InvalidRequest`."""
    if request.entrypoint is None:
        raise InvalidRequest(
            "method custom needs an entrypoint",
            code="missing_field",
            param="entrypoint",
            hint='For instance "train.py --lr 1e-4", of code that was uploaded, or "-m package.train".',
        )
    for field, given in (
        ("training_type", request.training_type is not None),
        ("task", request.task != "causal_lm"),
        ("validation_split", request.validation_split is not None),
    ):
        if given:
            raise InvalidRequest(
                f"{field} belongs to the methods sft and dpo: a script decides that itself",
                code="invalid_value",
                param=field,
                hint="Leave it out; `params` takes whatever the script wants to be told.",
            )


def plan_script(request: FinetuneRequest, code: Code | None) -> ScriptPlan:
    """Raises `InvalidRequest`."""
    words = entrypoint_of(request.entrypoint or "")
    if words[0] != "-m":
        _check_file(words[0], code)
    given = request.hyperparams.model_dump(exclude_none=True)
    params = dict(request.params or {})
    twice = sorted(given.keys() & params.keys())
    if twice:
        raise InvalidRequest(
            f"{twice[0]} is a hyperparameter and one of params",
            code="conflicting_fields",
            param=f"params.{twice[0]}",
            hint="Give it once: the script finds both in job.params.",
        )
    return ScriptPlan(words, {**given, **params}, given, code)


def entrypoint_of(text: str) -> list[str]:
    """As a shell splits it, but no shell sees it. Raises `InvalidRequest` (`invalid_entrypoint`)."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise _invalid(f"it cannot be split into words ({error})") from None
    if not words or len(words) > MAX_WORDS:
        raise _invalid("it is empty" if not words else f"it has more than {MAX_WORDS} words")
    if words[0] == "-m":
        if len(words) < 2 or not MODULE.fullmatch(words[1]):
            raise _invalid("after -m comes the name of a module")
        return words
    path = PurePosixPath(words[0])
    if path.suffix != ".py" or path.is_absolute() or ".." in path.parts:
        raise _invalid(f"{words[0][:80]!r} is neither a .py file of the code nor -m and a module")
    return [str(path), *words[1:]]


def _invalid(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the entrypoint cannot be started: {why}",
        code="invalid_entrypoint",
        param="entrypoint",
        hint='Write what follows `python` on a command line: "train.py --lr 1e-4" or "-m package.train".',
    )


def _check_file(name: str, code: Code | None) -> None:
    if code is None:
        raise InvalidRequest(
            f"the entrypoint {name[:80]} is a file, and the request names no code that it lies in",
            code="missing_field",
            param="code",
            hint="Upload it: `heliostat code upload FOLDER`, or `heliostat finetune --code FOLDER …`.",
        )
    if name not in code.files:
        near = [one for one in code.files if one.endswith(f"/{name}")] or difflib.get_close_matches(name, code.files, 1)
        raise InvalidRequest(
            f"{code.name}@{code.version} has no file {name[:80]}",
            code="entrypoint_not_found",
            param="entrypoint",
            hint=f"Did you mean `{near[0]}`?" if near else "`heliostat code show` lists the files.",
        )


def choose_room(request: FinetuneRequest, nodes: Sequence[Node], model: ModelFacts, fallback: bool) -> Choice:
    """Nothing is known of a script: each slot gets `mem_limit_gb`, else what it takes to load the model and answer with it.
    Raises as `resources.choose`."""
    asked = request.resource_config
    if (asked.num_nodes or 1) > 1:
        raise ResourceError(
            f"a script runs on one node, {asked.num_nodes} were asked for",
            code="unsupported_num_nodes",
            param="resource_config.num_nodes",
            hint="Leave num_nodes out and use num_gpus.",
        )
    found = candidates(asked, nodes, fallback)
    parameters = model.parameters or 0
    one = _estimate(asked.mem_limit_gb, parameters, asked.num_gpus or 1)
    fitting = [node for node in found.nodes if node.memory_gb >= one.total_gb and node.slots >= one.slots]
    if not fitting:
        have = ", ".join(f"{node.slots} x {node.kind} of {node.memory_gb:g} GiB" for node in found.nodes)
        raise ResourceError(
            f"this script fits on no node: {one.slots} slot(s) of {one.total_gb:g} GiB each; a node has: {have}",
            code="does_not_fit",
            param="resource_config",
            hint="Ask for fewer num_gpus, or a smaller mem_limit_gb.",
        )
    kinds = tuple(dict.fromkeys(node.kind for node in fitting))
    parked = PROCESS_GB + (one.total_gb if CPU in kinds else 0.0)
    shape = Shape(one.slots, one.total_gb, kinds, park_gb=round(parked * one.slots, 2))
    return Choice(((shape, one),), found.warnings, found.priced)


def _estimate(limit_gb: float | None, parameters: int, slots: int) -> Estimate:
    weights = parameters * BYTES_PER_PARAMETER
    total = limit_gb if limit_gb is not None else round(weights * MARGIN / GIB + PROCESS_GB, 2)
    decided_by = "mem_limit_gb" if limit_gb is not None else "inference"
    return Estimate({"weights": weights}, total, rule_gb(parameters), decided_by, parameters, 0, slots)
