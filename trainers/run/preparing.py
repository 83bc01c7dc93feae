"""Makes a node ready for an attempt: environment, base model, the attempt's own files; and from them the worker's task."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cluster.staging import caches_of
from cluster.storage.objects import ObjectStore, folder_sha256
from trainers.config import Hyperparams, TrainConfig
from trainers.run.child_files import MANIFEST
from trainers.run.parts import AgentHandle, Agents, DriverSettings, Report, WorkerTask
from trainers.run.ports import Assignment

CPU = "cpu"
TRAIN, VALIDATION, ADAPTER, RESUME, OUT = "data/train.jsonl", "data/validation.jsonl", "adapter", "resume", "out"
PROGRAM, BEST = "program", "best"
"""Below the scratch folder of the attempt."""
ALWAYS = ("curves", "tensorboard")
"""Outputs that every artifact has; a job in an environment without their libraries says so."""
_NO_WEIGHTS = (
    "state.json",
    "random.pt",
    "optimizer-",
    "history.jsonl",
    "curves.png",
    "merged/",
    "gguf/",
    "tensorboard/",
)

T = TypeVar("T")
Files = dict[str, tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """Of a gang: what one node has of it."""

    node: str
    slots: tuple[int, ...]
    first_rank: int = 0


def parts_of(assignment: Assignment) -> list[Part]:
    """The largest first; its first rank is the one that leads."""
    placed = sorted(assignment.placement.nodes.items(), key=lambda place: (-len(place[1]), place[0]))
    begins = itertools.accumulate((len(slots) for _, slots in placed), initial=0)
    return [Part(node, tuple(slots), first) for (node, slots), first in zip(placed, begins, strict=False)]


def prepare(assignment: Assignment, agents: Agents, settings: DriverSettings, report: Report) -> dict[str, WorkerTask]:
    """By node, the leading one first. The children start at once: they import and load while Ray starts its workers. `report`: of
    the leading node. Raises as `stage`."""

    def staged(part: Part) -> WorkerTask:
        told = report if part.first_rank == 0 else _untold
        return stage(assignment, part, agents.of(part.node), settings, told)

    parts = parts_of(assignment)
    tasks = dict(zip((part.node for part in parts), _side_by_side(staged, parts), strict=True))
    if len(tasks) > 1:
        tasks = _meeting(tasks, agents)
    return {node: replace(task, keeper=agents.of(node).start_child(task)) for node, task in tasks.items()}


def _meeting(tasks: dict[str, WorkerTask], agents: Agents) -> dict[str, WorkerTask]:
    """Asked for when all else is there: nobody keeps the port until rank 0 listens on it."""
    points = {node: agents.of(node).meeting_point() for node in tasks}
    at = next(iter(points.values()))
    return {
        node: replace(task, address=points[node].rsplit(":", 1)[0], config={**task.config, "meeting_point": at})
        for node, task in tasks.items()
    }


def _side_by_side(do: Callable[[Part], WorkerTask], parts: Sequence[Part]) -> list[WorkerTask]:
    """In the order of the parts. Raises what the first to fail raises, at once: the others may be at it for an hour, in threads
    that nobody waits for."""
    if len(parts) == 1:
        return [do(parts[0])]
    done: queue.SimpleQueue[tuple[int, WorkerTask | Exception]] = queue.SimpleQueue()

    def work(at: int, part: Part) -> None:
        try:
            done.put((at, do(part)))
        except Exception as error:  # noqa: BLE001 - raised again by who waits
            done.put((at, error))

    for at, part in enumerate(parts):
        threading.Thread(target=work, args=(at, part), name=f"prepare {part.node}", daemon=True).start()
    found: dict[int, WorkerTask] = {}
    while len(found) < len(parts):
        at, made = done.get()
        if isinstance(made, Exception):
            raise made
        found[at] = made
    return [found[at] for at in range(len(parts))]


def _untold(stage: str, seconds: float) -> None:
    pass


def stage(
    assignment: Assignment,
    part: Part,
    agent: AgentHandle,
    settings: DriverSettings,
    report: Report,
    *,
    ahead: bool = False,
) -> WorkerTask:
    """Makes the node of the part ready. `ahead`: of the grant. Raises what the agent raises, and `NotFound` for an adapter that is
    not in storage."""
    made = _timed("environment", report, lambda: agent.prepare_environment(assignment.lock))
    for stage, seconds in made.get("stages", {}).items():
        report(f"environment_{stage}", seconds)
    base = _timed(
        "model", report, lambda: agent.stage_model(assignment.base_model_prefix, assignment.base_model_sha256)
    )
    files = attempt_files(assignment, ObjectStore(settings.storage_url))
    scratch = _timed(
        "staging",
        report,
        lambda: agent.stage_attempt(assignment.job_id, assignment.attempt, files, ahead=ahead),
    )
    seen = agent.report()
    node = seen.node
    threads = max(1, seen.cpus // max(1, node.slots))
    config = train_config(assignment, part, settings, base, scratch, threads)
    return WorkerTask(
        job_id=assignment.job_id,
        attempt=assignment.attempt,
        tenant=assignment.tenant,
        fingerprint=made["fingerprint"],
        python=made["python"],
        scratch=scratch,
        config=config.to_dict(),
        visible_devices=visible_devices(assignment, part),
        threads=threads,
        settings=settings,
        uid=assignment.uid,
        memory_gb=node.memory_gb * len(part.slots) if assignment.kind == CPU else None,
    )


def _timed(stage: str, report: Report, do: Callable[[], T]) -> T:
    started = time.monotonic()
    done = do()
    report(stage, time.monotonic() - started)
    return done


def attempt_files(assignment: Assignment, storage: ObjectStore) -> Files:
    """Name below the scratch folder → (key, sha256)."""
    files: Files = {TRAIN: (assignment.dataset_key, assignment.dataset_sha256)}
    if assignment.validation_key and assignment.validation_sha256:
        files[VALIDATION] = (assignment.validation_key, assignment.validation_sha256)
    if assignment.adapter_prefix:
        manifest = json.loads(storage.read_bytes(f"{assignment.adapter_prefix}/{MANIFEST}"))
        files |= _below(ADAPTER, assignment.adapter_prefix, weights_of(manifest))
    if assignment.checkpoint:
        files |= _below(RESUME, assignment.checkpoint.prefix, assignment.checkpoint.files)
    if assignment.script:
        files |= _below(PROGRAM, assignment.script.prefix, assignment.script.files)
    if assignment.best:
        files |= _below(BEST, assignment.best.prefix, weights_of(assignment.best.files))
    return files


def weights_of(files: dict[str, str]) -> dict[str, str]:
    """Of a checkpoint without what only the run that wrote it can use: optimizer states, the position and the journal; of a
    version without its other forms."""
    return {name: sha256 for name, sha256 in files.items() if not name.startswith(_NO_WEIGHTS)}


def _below(folder: str, prefix: str, files: dict[str, str]) -> Files:
    return {f"{folder}/{name}": (f"{prefix}/{name}", sha256) for name, sha256 in files.items()}


def visible_devices(assignment: Assignment, part: Part) -> str:
    """The leased GPUs, none on a `cpu` node."""
    return "" if assignment.kind == CPU else ",".join(str(slot) for slot in part.slots)


def train_config(
    assignment: Assignment, part: Part, settings: DriverSettings, base: str, scratch: str, threads: int
) -> TrainConfig:
    """What the child is told; only places below the scratch folder and the model's."""
    script = assignment.script
    return TrainConfig(
        base_model=base,
        train_file=f"{scratch}/{TRAIN}",
        output_dir=f"{scratch}/{OUT}",
        validation_file=f"{scratch}/{VALIDATION}" if assignment.validation_key else None,
        adapter=f"{scratch}/{ADAPTER}" if assignment.adapter_prefix else None,
        method=assignment.method,
        task=assignment.task,
        training_type=assignment.training_type,
        hyperparams=hyperparams_of(assignment),
        precision=assignment.precision,
        world_size=assignment.placement.slots,
        first_rank=part.first_rank,
        node_ranks=len(part.slots),
        devices=CPU if assignment.kind == CPU else "cuda",
        threads_per_slot=threads,
        checkpoint_every_s=settings.checkpoint_every_s,
        resume_from=f"{scratch}/{RESUME}" if assignment.checkpoint else None,
        exact_match_rows=settings.exact_match_rows,
        memory_limit_gb=assignment.memory_limit_gb,
        cache_dir=str(caches_of(Path(scratch)) / assignment.tenant),
        metadata=lineage(assignment),
        entrypoint=script.entrypoint if script else None,
        code=f"{scratch}/{PROGRAM}" if script and script.files else None,
        params=script.params if script else {},
        best_checkpoint=f"{scratch}/{BEST}" if assignment.best else None,
        outputs=[*assignment.outputs, *ALWAYS],
    )


def hyperparams_of(assignment: Assignment) -> Hyperparams:
    """The micro-batch changes rounding only: a run that was short of memory goes on with a smaller one."""
    if not assignment.short_of_memory:
        return assignment.hyperparams
    return replace(assignment.hyperparams, micro_batch_size=fewer_rows(assignment))


def fewer_rows(assignment: Assignment) -> int:
    """In one forward pass of a rank: half of what it had; one where tokens had bounded it, of which nobody here knows the rows. 0:
    it had one row only."""
    hyper = assignment.hyperparams
    share = math.ceil(hyper.batch_size / assignment.placement.slots)
    if hyper.micro_batch_size is None:
        return min(1, share - 1)
    return min(share, hyper.micro_batch_size) // 2


def _code_version() -> str:
    try:
        return importlib.metadata.version("heliostat")
    except importlib.metadata.PackageNotFoundError:  # a tree that nobody installed
        return "unknown"


def lineage(assignment: Assignment) -> dict[str, object]:
    """What a model version needs to be made again, beside its hyperparameters."""
    script = assignment.script
    return {
        "job_id": assignment.job_id,
        "base_model": assignment.base_model_name,
        "base_model_sha256": assignment.base_model_sha256,
        "adapter_prefix": assignment.adapter_prefix,
        "dataset_sha256": assignment.dataset_sha256,
        "validation_sha256": assignment.validation_sha256,
        "environment": assignment.fingerprint,
        "code_version": _code_version(),
        "output_model": assignment.output_model,
        **(
            {"entrypoint": script.entrypoint, "params": script.params, "code_sha256": folder_sha256(script.files)}
            if script
            else {}
        ),
    }
