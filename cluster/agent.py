"""The agent of one node: says what it offers and runs, prepares environments, stages files, ends attempts. Without Ray;
`cluster.client` makes it an actor. All methods are safe to repeat and to call at the same time."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.core.job import Node
from cluster.detect import computes_in_bf16, detect, usable_cpus
from cluster.environment_checks import EnvironmentChecks, Note
from cluster.ports import (
    AgentParts,
    Attempt,
    CheckedEnvironment,
    Children,
    EnvironmentStore,
    NodeReport,
    StagedModel,
)
from cluster.processes import end_attempt, running_attempts
from cluster.staging import Staging
from cluster.storage.objects import ObjectStore

_NUMBER = re.compile(r"\d{1,12}(\.\d+)?")


@dataclass(frozen=True)
class _Opened:
    environments: EnvironmentStore
    checks: EnvironmentChecks
    staging: Staging
    offer: Node
    notice_file: Path | None
    children: Children | None
    bf16: bool


class NodeAgent:
    """Looks at the machine with the first call; what the node offers does not change while its agent lives. Every method
    raises `InvalidRequest` or `Unavailable` while the node cannot say what it offers, and tries again when called again."""

    def __init__(self, name: str, wiring: Callable[[], AgentParts], note: Note = lambda check: None) -> None:
        self._name = name
        self._wiring = wiring
        self._note = note
        self._opened: _Opened | None = None
        self._opening = threading.Lock()

    def _open(self) -> _Opened:
        with self._opening:
            if self._opened is None:
                parts = self._wiring()
                staging = Staging(parts.settings.root, ObjectStore(parts.settings.storage_url))
                offer = detect(self._name, parts.settings)
                checks = EnvironmentChecks(parts.environments, self._note)
                if parts.settings.full_check_at:
                    checks.start_daily(parts.settings.full_check_at, self._name)
                staging.clear_all_ahead()
                notice = parts.settings.notice_file
                self._opened = _Opened(
                    parts.environments, checks, staging, offer, notice, parts.children, computes_in_bf16()
                )
            return self._opened

    def report(self) -> NodeReport:
        """Only attempts that were staged here: another Heliostat may run on the same machine. A child that was started for a
        job that still waits is no attempt yet."""
        here = self._open()
        leaves_at = notice(here.notice_file)
        has, draining = here.environments.ready(), leaves_at is not None
        node = replace(here.offer, environments=has, models=here.staging.models(), draining=draining)
        ours = frozenset(attempt for attempt in running_attempts() if here.staging.ran_here(attempt[0]))
        ours -= here.children.waiting() if here.children else frozenset()
        return NodeReport(node, ours, leaves_at, here.checks.last(has), usable_cpus(), here.bf16)

    def prepare_environment(self, lock: dict[str, Any]) -> dict[str, Any]:
        """{fingerprint, prefix, python, stages: seconds of each}; may take minutes. Raises `EnvironmentError_`, `Unavailable`."""
        made = self._open().checks.prepare(lock)
        places = {"prefix": str(made.prefix), "python": str(made.python)}
        return {"fingerprint": made.fingerprint, **places, "stages": dict(made.stages)}

    def check_environment(self, fingerprint: str, repair: bool) -> CheckedEnvironment | None:
        """None: it is not on this node. Reads all of it (seconds). Raises `Unavailable`."""
        return self._open().checks.check(fingerprint, repair=repair)

    def stage_model(self, prefix: str, sha256: str, files: dict[str, str] | None = None) -> str:
        """The folder with the model. Raises `NotFound`, `Conflict` (`object_damaged`)."""
        return str(self._open().staging.stage_model(prefix, sha256, files))

    def stage_ahead(self, model: StagedModel) -> None:
        """Before any job needs it. Raises as `stage_model`, and `Unavailable` (`node_disk_full`)."""
        self._open().staging.stage_ahead(model.prefix, model.sha256, model.bytes)

    def stage_attempt(
        self, job_id: str, attempt: int, files: dict[str, tuple[str, str]], *, ahead: bool = False
    ) -> str:
        """The scratch folder of the attempt, with the files (name → (key, sha256)) in it. `ahead`: it is not granted yet.
        Raises as `stage_model`."""
        return str(self._open().staging.stage_attempt(job_id, attempt, files, ahead=ahead))

    def start_child(self, task: Any) -> str | None:
        """The training child of a worker that is not there yet: where it will find it, or None."""
        children = self._open().children
        return None if children is None else children.start(task)

    def expect(self, attempts: Sequence[Attempt]) -> Sequence[Attempt]:
        """Attempts that may come here next, all of them; those that this node knows nothing of yet."""
        children = self._open().children
        return () if children is None else children.expect(attempts)

    def prepare_ahead(self, coming: Any) -> None:
        """For one of those; returns at once."""
        children = self._open().children
        if children is not None:
            children.prepare(coming, self)

    def clear_ahead(self, job_id: str, attempt: int) -> None:
        """What was staged ahead for an attempt that does not come here."""
        self._open().staging.clear_ahead(job_id, attempt)

    def clear_attempt(self, job_id: str, attempt: int) -> None:
        self._open().staging.clear_attempt(job_id, attempt)

    def end_attempt(self, job_id: str, attempt: int) -> bool:
        """SIGKILLs what lives of the attempt; True when nothing does any more, and then its scratch is gone too."""
        if not end_attempt(job_id, attempt):
            return False
        self.clear_attempt(job_id, attempt)
        return True


def notice(file: Path | None) -> float | None:
    """When the node goes away (Unix seconds; when the file was written, if it names no time); None: it stays."""
    if file is None:
        return None
    try:
        text, written = file.read_text().strip(), file.stat().st_mtime
    except FileNotFoundError:
        return None
    return float(text) if _NUMBER.fullmatch(text) else written
