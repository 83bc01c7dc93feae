"""What runs in the Train worker of a node: starts the child, relays between it and the driver, stores what it makes.
Never imports torch, and no package of a tenant."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cluster.errors import HeliostatError, JobFailure, Unavailable
from cluster.storage.objects import ObjectStore
from runtime_envs.sandbox.watch import Watch
from trainers.protocol import MAX_MESSAGE_BYTES
from trainers.run.child_files import Upload
from trainers.run.child_logs import ChildLogs
from trainers.run.child_process import Child, Spawn, adopt_or_spawn
from trainers.run.confinement import node_share
from trainers.run.messages import checked
from trainers.run.parts import DriverGone, DriverHandle, Order, Record, WorkerTask

log = logging.getLogger(__name__)

FINGERPRINT_VARIABLE = "HELIOSTAT_ENV_FINGERPRINT"
"""Set by the `tenant_env` plug-in once it has verified the environment."""

_LISTEN_S = 0.5
_FIRST_RELAY_S = 0.05
_LEAVE_S = 10.0
_UPLOAD_TRIES = 4
_PROGRESS_S = 60.0
"""Between two words about the same upload."""
_SUPERSEDED = "superseded"
_OF_COMPANIONS = ("hello", "log", "failed")
"""All that is to be said on a gang's nodes without rank 0."""


def work(driver: DriverHandle) -> None:
    """One worker, from its task to its end. Raises `Unavailable` when the environment is not the task's."""
    task = driver.task()
    found = os.environ.get(FINGERPRINT_VARIABLE)
    if found != task.fingerprint:
        raise Unavailable(
            f"the node gave this worker the environment {found or 'of the platform'} and not {task.fingerprint}",
            code="environment_not_verified",
            hint="The node needs the runtime environment plug-in `tenant_env`.",
        )
    Worker(task, driver, ObjectStore(task.settings.storage_url)).run()


class Worker:
    """The conversation with one child. The listening thread spawns it, or takes it over, and stays; one thread speaks to the driver,
    one uploads in order, one reads the output."""

    def __init__(
        self, task: WorkerTask, driver: DriverHandle, storage: ObjectStore, spawn: Spawn = adopt_or_spawn
    ) -> None:
        self._task = task
        self._driver = driver
        self._spawn = spawn
        self._upload = Upload(storage, Path(task.config["output_dir"]), task.settings.max_output_bytes)
        self._storage = storage
        self._outbox: queue.Queue[Record] = queue.Queue(maxsize=10_000)
        self._ending = threading.Event()
        self._finished = threading.Event()
        self._end: Record | None = None
        self._newest: Record | None = None
        """The last checkpoint that the child has written."""
        self._told_to_stop = False

    def run(self) -> None:
        """Returns when the child has ended, and the driver knows how or is gone."""
        share, output = node_share(self._task), Path(self._task.config["output_dir"])
        try:
            child = self._spawn(self._task)
        except HeliostatError as error:  # this node cannot isolate it
            self._driver.relay([{"type": "failed", **error.as_dict(), "log_tail": [], "at": time.time()}])
            return
        look = partial(share.exceeded, child.process.pid, output, child.group)
        watch = Watch(look, partial(self._take_too_much, child))
        self._logs = ChildLogs(self._storage, self._log_prefix(), child.logs, self._task.settings.max_log_bytes)
        self._logs.start()
        relay = threading.Thread(target=self._relay, args=(child,), name="relay", daemon=True)
        relay.start()
        uploads = ThreadPoolExecutor(1, thread_name_prefix="upload")
        watch.start()
        try:
            self._converse(child, uploads)
        finally:
            child.channel.close()
            watch.close()
            code = child.end(0.0 if self._ending.is_set() else _LEAVE_S)
            uploads.shutdown(wait=True)
            self._logs.close()
            if child.overran:
                self._blame(share.killed())
            self._report_end(code)
            self._finished.set()
            relay.join()

    def _take_too_much(self, child: Child, failure: JobFailure) -> None:
        """From the watch's thread: what it takes is taken from others."""
        self._conclude({"type": "failed", **failure.as_dict()})
        child.kill()

    def _log_prefix(self) -> str:
        first = self._task.config["first_rank"]
        return f"{self._task.prefix}/jobs/{self._task.job_id}/logs/a{self._task.attempt}/r{first}"

    def _converse(self, child: Child, uploads: ThreadPoolExecutor) -> None:
        self._tell("spawned")
        if child.note:
            self._tell("log", level="warning", message=child.note)
        if child.failure is not None:
            self._conclude(child.failure)
        try:
            if not child.started:
                child.channel.send("start", config=self._task.config)
            self._listen(child, uploads)
        except JobFailure as failure:
            self._conclude({"type": "failed", **failure.as_dict()})
        except BrokenPipeError:
            pass  # it was dead before it heard us; its exit code says more

    def _listen(self, child: Child, uploads: ThreadPoolExecutor) -> None:
        """Until the child's last word, end of file, or an order to end. Raises `JobFailure` for a child that breaks the
        protocol."""
        last = False
        while not last and not self._ending.is_set():
            try:
                message = child.channel.receive(_LISTEN_S)
            except TimeoutError:
                continue
            except ValueError:
                raise _unreadable() from None
            last = message is None or self._hear(checked(message), child, uploads)

    def _hear(self, message: Record, child: Child, uploads: ThreadPoolExecutor) -> bool:
        """Whether this was the child's last word."""
        kind = message["type"]
        if self._task.config["first_rank"] and kind not in _OF_COMPANIONS:
            raise _not_its_own(kind)
        if kind == "checkpoint":
            self._newest = message
            uploads.submit(self._store_checkpoint, message, child)
        elif kind == "failed":
            self._conclude(message)
        elif _is_stop(message):
            self._conclude({"type": "stopped"})
        else:
            self._put(message)
        if kind == "finished":
            uploads.submit(self._store_artifact, message)
        return kind in ("failed", "finished") or _is_stop(message)

    def _store_checkpoint(self, message: Record, child: Child) -> None:
        """One that cannot be stored costs work after a fault, no more: the child hears that it may go."""
        task, step = self._task, message["step"]
        prefix = f"{task.prefix}/jobs/{task.job_id}/checkpoints/a{task.attempt}-s{step}"
        try:
            self._give_up_if(self._is_superseded(message), step)
            self._put(self._stored("stored", message["path"], message, prefix))
            return
        except JobFailure as error:
            self._fail(error)
        except HeliostatError as error:
            if error.code != _SUPERSEDED:
                self._tell("log", level="warning", message=f"{error.message}; training goes on")
        self._obey({"order": "dropped", "step": step}, child)

    def _store_artifact(self, message: Record) -> None:
        prefix = f"{self._task.prefix}/models/{self._task.job_id}/a{self._task.attempt}"
        try:
            self._conclude(self._stored("artifact", message["artifact"], message, prefix))
        except HeliostatError as error:
            self._fail(error)

    def _fail(self, error: HeliostatError) -> None:
        self._conclude({"type": "failed", **error.as_dict()})
        self._ending.set()

    def _stored(self, kind: str, folder: str, message: Record, prefix: str) -> Record:
        """Raises `JobFailure` and `Unavailable`."""
        files = self._upload_patiently(folder, message, prefix)
        return {"type": kind, "step": message["step"], "prefix": prefix, "files": files, "metrics": message["metrics"]}

    def _is_superseded(self, message: Record) -> bool:
        """Nobody would go on from this checkpoint; the best one so far is kept all the same."""
        newest = self._newest
        if newest is None or message["type"] != "checkpoint" or newest["step"] <= message["step"]:
            return False
        return bool(newest["metrics"].get("best_step") != message["step"])

    def _give_up_if(self, superseded: bool, step: int) -> None:
        if superseded:
            raise Unavailable(
                f"the checkpoint of step {step} is not stored: a newer one was there first", code=_SUPERSEDED
            )

    def _told_of(self, message: Record) -> Callable[[int], None]:
        """For an upload: says now and then how far it is. Told to stop, there is little time: all of it is the last
        checkpoint's."""
        read, told_at = 0, time.monotonic()

        def told(size: int) -> None:
            nonlocal read, told_at
            self._give_up_if(self._told_to_stop and self._is_superseded(message), message["step"])
            read += size
            if time.monotonic() - told_at >= _PROGRESS_S:
                told_at = time.monotonic()
                what = "model" if message["type"] == "finished" else f"checkpoint of step {message['step']}"
                self._tell("progress", what=f"storing the {what}, MiB", done=read >> 20, total=0)

        return told

    def _upload_patiently(self, folder: str, message: Record, prefix: str) -> dict[str, str]:
        for attempt in range(_UPLOAD_TRIES):
            try:
                return self._upload.store(folder, message["sha256"], prefix, self._told_of(message))
            except OSError as error:
                reason = error
            if self._ending.wait(2.0**attempt) or self._is_superseded(message):
                break
        raise Unavailable(f"storage did not take {prefix}: {reason}", code="storage_unavailable", fixable_by="nobody")

    def _conclude(self, end: Record) -> None:
        """How the attempt ended: the first word counts. The driver hears it when everything else is stored."""
        if self._end is None:
            self._end = end

    def _blame(self, failure: JobFailure) -> None:
        """For an end that has no name, or the one that a launcher gave it that saw no more than the death of a rank."""
        if self._end is None or self._end["type"] == "failed":
            self._end = {"type": "failed", **failure.as_dict()}

    def _report_end(self, code: int) -> None:
        lost = {"type": "lost", "exit_code": code, "signal": -code if code < 0 else None}
        self._put({**(self._end or lost), "log_tail": self._logs.tail()})

    def _tell(self, kind: str, **fields: Any) -> None:
        self._put({"type": kind, **fields})

    def _put(self, record: Record) -> None:
        """Waits when the driver is held up by its database: that holds up the child, in the end."""
        self._outbox.put({**record, "at": time.time()})

    def _relay(self, child: Child) -> None:
        """Steps travel in batches, orders in the answers. The last batch goes when all else is done. However this thread
        ends before that: a child that nobody hears and nobody can stop is ended."""
        try:
            self._relay_to_the_end(child)
        except DriverGone:
            log.warning("the driver of %s is gone: ending the child", self._task.mark)
        finally:
            self._ending.set()
            while not self._finished.wait(self._task.settings.relay_s):
                self._drain()  # so that nobody waits for room

    def _relay_to_the_end(self, child: Child) -> None:
        """Often at first: a child that started before its worker has much to tell."""
        last, pause_s = False, _FIRST_RELAY_S
        while not last:
            last = self._finished.wait(min(pause_s, self._task.settings.relay_s))
            pause_s *= 2
            for order in self._driver.relay(self._drain()):
                self._obey(order, child)

    def _drain(self) -> list[Record]:
        records: list[Record] = []
        while not self._outbox.empty():
            records.append(self._outbox.get_nowait())
        return records

    def _obey(self, order: Order, child: Child) -> None:
        try:
            match order["order"]:
                case "end":
                    self._ending.set()
                case "saved" | "dropped" as word:
                    child.channel.send(word, step=order["step"])
                case "release":
                    child.channel.send("release", action=order["action"])
                case "command":
                    self._told_to_stop = self._told_to_stop or order["command"] == "stop"
                    child.channel.send("command", id=order["id"], command=order["command"])
        except OSError as error:  # it is leaving, or does not listen: the driver's grace period ends that
            log.info("an order did not reach the child of %s: %s", self._task.mark, error)


def _not_its_own(kind: str) -> JobFailure:
    return JobFailure(
        f"a training process without rank 0 sent a message {kind}, which is for rank 0 alone",
        code="protocol_violation",
        hint="Training code must leave the control socket alone.",
    )


def _is_stop(message: Record) -> bool:
    """Its checkpoint, if there was anything to keep, came before."""
    return bool(message["type"] == "ack" and message["command"] == "stop")


def _unreadable() -> JobFailure:
    return JobFailure(
        f"the training process sent what is not a JSON message of at most {MAX_MESSAGE_BYTES} bytes",
        code="protocol_violation",
        hint="Training code must leave the control socket alone.",
    )
