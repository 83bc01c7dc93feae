from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fakes_cluster import NoEnvironments
from waiting import until

from cluster import staging
from cluster.agent import NodeAgent
from cluster.errors import Conflict, NotFound, Unavailable
from cluster.ports import AgentParts, NodeSettings, StagedModel
from cluster.processes import MARK_VARIABLE
from cluster.staging import Staging
from cluster.storage.objects import ObjectStore, folder_sha256

JOB = f"ftjob-end{os.getpid()}"
MODEL = {"config.json": b"{}", "weights/model.safetensors": b"w" * 100_000}


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStore:
    return ObjectStore(str(tmp_path / "objects"))


@pytest.fixture
def agent(tmp_path: Path, objects: ObjectStore) -> NodeAgent:
    return NodeAgent("n1", lambda: _parts(tmp_path))


def _parts(tmp_path: Path, **declared: Any) -> AgentParts:
    settings = NodeSettings(tmp_path / "node", str(tmp_path / "objects"), kind="cpu", slots=2, memory_gb=3, **declared)
    return AgentParts(NoEnvironments(tmp_path), settings)


def _put_model(objects: ObjectStore, prefix: str = "models/m") -> str:
    files = {name: objects.put_bytes(f"{prefix}/{name}", data) for name, data in MODEL.items()}
    objects.put_bytes(f"{prefix}/manifest.json", json.dumps(files).encode())
    return folder_sha256(files)


def _modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), path.stat().st_mode & 0o777) for path in [folder, *folder.rglob("*")]}


def test_the_report_says_what_is_offered_and_cached(agent: NodeAgent, objects: ObjectStore) -> None:
    sha256 = _put_model(objects)
    agent.stage_model("models/m", sha256)
    node = agent.report().node
    assert (node.name, node.kind, node.slots, node.memory_gb) == ("n1", "cpu", 2, 3)
    assert (node.environments, node.models) == ({"base"}, {sha256})


@pytest.mark.parametrize(
    ("written", "leaves_at"), [("1900000000", 1.9e9), ("1900000000.5\n", 1.9e9 + 0.5), ("soon", 7.0)]
)
def test_a_notice_makes_the_node_leave(tmp_path: Path, written: str, leaves_at: float) -> None:
    file = tmp_path / "notice"
    agent = NodeAgent("n1", lambda: _parts(tmp_path, notice_file=file))
    assert (agent.report().node.draining, agent.report().leaves_at) == (False, None)
    file.write_text(written)
    os.utime(file, (7.0, 7.0))
    assert (agent.report().node.draining, agent.report().leaves_at) == (True, leaves_at)
    file.unlink()
    assert not agent.report().node.draining


def test_the_report_says_what_the_node_costs_and_where_it_is(tmp_path: Path) -> None:
    agent = NodeAgent("n1", lambda: _parts(tmp_path, market="spot", region="north", price_per_hour=0.5))
    node = agent.report().node
    assert (node.market, node.region, node.price, node.park_gb) == ("spot", "north", 0.5, 3.0)


def test_an_agent_that_cannot_open_yet_says_so_and_tries_again(tmp_path: Path) -> None:
    answers = [Unavailable("the share is not mounted"), _parts(tmp_path)]

    def wiring() -> AgentParts:
        answer = answers.pop(0)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    agent = NodeAgent("n1", wiring)
    with pytest.raises(Unavailable):
        agent.report()
    assert agent.report().node.name == "n1"
    assert answers == []


def test_an_environment_is_handed_on_as_plain_data(agent: NodeAgent, tmp_path: Path) -> None:
    assert agent.prepare_environment({"fingerprint": "f1"}) == {
        "fingerprint": "f1",
        "prefix": str(tmp_path / "f1"),
        "python": str(tmp_path / "f1/bin/python"),
        "stages": {},
    }


def test_an_environment_is_checked_where_it_is(agent: NodeAgent) -> None:
    assert agent.check_environment("f1", repair=False) is None
    checked = agent.check_environment("base", repair=True)
    assert checked is not None and (checked.damaged, checked.repaired) == (("lib/a.py",), True)


# Models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_staged_once_and_readable_by_other_users(agent: NodeAgent, objects: ObjectStore) -> None:
    sha256 = _put_model(objects)
    before = os.umask(0o077)
    try:
        folder = Path(agent.stage_model("models/m", sha256))
    finally:
        os.umask(before)
    assert {name: (folder / name).read_bytes() for name in MODEL} == MODEL
    assert _modes(folder / "weights") == {(True, 0o755), (False, 0o644)}
    assert folder.stat().st_mode & 0o777 == 0o755
    objects.delete_prefix("models/m")
    assert agent.stage_model("models/m", sha256) == str(folder)


@pytest.mark.parametrize("damage", ["unfinished", "cut", "removed"])
def test_a_copy_that_is_not_whole_is_made_again(agent: NodeAgent, objects: ObjectStore, damage: str) -> None:
    sha256 = _put_model(objects)
    folder = Path(agent.stage_model("models/m", sha256))
    weights = folder / "weights/model.safetensors"
    if damage == "unfinished":
        (folder / "READY").unlink()
        weights.write_bytes(b"half")
    elif damage == "cut":
        weights.write_bytes(b"w")
    else:
        weights.unlink()
    agent.stage_model("models/m", sha256)
    assert weights.read_bytes() == MODEL["weights/model.safetensors"]


def test_a_damaged_object_is_not_staged(agent: NodeAgent, objects: ObjectStore) -> None:
    sha256 = _put_model(objects)
    objects.put_bytes("models/m/config.json", b"[]")
    with pytest.raises(Conflict) as caught:
        agent.stage_model("models/m", sha256)
    assert caught.value.code == "object_damaged"
    assert agent.report().node.models == frozenset()


def test_another_models_manifest_is_refused(agent: NodeAgent, objects: ObjectStore) -> None:
    _put_model(objects)
    with pytest.raises(Conflict):
        agent.stage_model("models/m", "0" * 64)


def test_a_model_that_is_not_there_is_not_found(agent: NodeAgent) -> None:
    with pytest.raises(NotFound):
        agent.stage_model("models/none", "0" * 64)


def test_many_calls_at_once_make_one_copy(agent: NodeAgent, objects: ObjectStore) -> None:
    sha256 = _put_model(objects)
    folders: list[str] = []
    threads = [threading.Thread(target=lambda: folders.append(agent.stage_model("models/m", sha256))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 8
    assert len(set(folders)) == 1
    assert {name: (Path(folders[0]) / name).read_bytes() for name in MODEL} == MODEL


# Attempts ---------------------------------------------------------------------------------------------------------


def _files(objects: ObjectStore) -> dict[str, tuple[str, str]]:
    return {"data/train.jsonl": ("tenants/acme/rows", objects.put_bytes("tenants/acme/rows", b'{"text":"hi"}\n'))}


def test_the_files_of_an_attempt_lie_in_its_scratch_and_older_ones_go(agent: NodeAgent, objects: ObjectStore) -> None:
    first = Path(agent.stage_attempt("ftjob-1", 1, _files(objects)))
    assert (first / "data/train.jsonl").read_bytes() == b'{"text":"hi"}\n'
    assert _modes(first) == {(True, 0o755), (False, 0o644)}
    second = Path(agent.stage_attempt("ftjob-1", 2, _files(objects)))
    assert (first.exists(), (second / "data/train.jsonl").is_file()) == (False, True)
    assert agent.stage_attempt("ftjob-1", 2, _files(objects)) == str(second)


def test_what_came_ahead_is_not_fetched_again_and_belongs_to_who_was_granted(
    tmp_path: Path, agent: NodeAgent, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = Path(agent.stage_attempt("ftjob-1", 1, _files(objects), ahead=True))
    fetched: list[str] = []
    monkeypatch.setattr(ObjectStore, "get_file", lambda self, key, *more: fetched.append(key))
    assert agent.stage_attempt("ftjob-1", 1, _files(objects)) == str(ahead)
    assert agent.stage_attempt("ftjob-1", 1, _files(objects), ahead=True) == str(ahead), "it comes too late"
    agent.clear_ahead("ftjob-1", 1)
    NodeAgent("n1", lambda: _parts(tmp_path)).report()
    assert (fetched, (ahead / "data/train.jsonl").is_file()) == ([], True)


def test_what_came_ahead_goes_with_its_job_or_with_the_agent(
    tmp_path: Path, agent: NodeAgent, objects: ObjectStore
) -> None:
    first, second = (Path(agent.stage_attempt(f"ftjob-{n}", 1, _files(objects), ahead=True)) for n in (1, 2))
    agent.clear_ahead("ftjob-1", 1)
    agent.clear_ahead("ftjob-never", 1)
    assert (first.exists(), second.exists()) == (False, True)
    NodeAgent("n1", lambda: _parts(tmp_path)).report()
    assert not second.exists()
    assert list((tmp_path / "node/jobs").rglob("next-*")) == []


def test_what_came_ahead_and_was_changed_is_fetched_again(agent: NodeAgent, objects: ObjectStore) -> None:
    rows = Path(agent.stage_attempt("ftjob-1", 1, _files(objects), ahead=True)) / "data/train.jsonl"
    content = rows.read_bytes()
    rows.write_bytes(content[:-1])
    agent.stage_attempt("ftjob-1", 1, _files(objects))
    assert rows.read_bytes() == content


def test_a_file_with_other_content_is_refused(agent: NodeAgent, objects: ObjectStore) -> None:
    objects.put_bytes("rows", b"new")
    with pytest.raises(Conflict):
        agent.stage_attempt("ftjob-1", 1, {"data/train.jsonl": ("rows", hashlib.sha256(b"old").hexdigest())})


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "data/../../out", ""])
def test_names_stay_inside_the_scratch(agent: NodeAgent, objects: ObjectStore, name: str) -> None:
    sha256 = objects.put_bytes("rows", b"x")
    with pytest.raises(ValueError, match="below a folder"):
        agent.stage_attempt("ftjob-1", 1, {name: ("rows", sha256)})


def test_a_job_id_cannot_leave_its_folder(agent: NodeAgent) -> None:
    with pytest.raises(ValueError, match="plain name"):
        agent.stage_attempt("../ftjob", 1, {})


def test_ending_an_attempt_kills_its_processes_and_clears_its_scratch(agent: NodeAgent, objects: ObjectStore) -> None:
    scratch = Path(agent.stage_attempt(JOB, 1, _files(objects)))
    with subprocess.Popen(["sleep", "600"], env={MARK_VARIABLE: f"{JOB}/1"}, start_new_session=True) as process:
        try:
            until(lambda: agent.report().attempts == {(JOB, 1)})  # /proc shows it a moment after the start
            assert agent.end_attempt(JOB, 1)
            assert process.wait(60) == -9
        finally:
            process.kill()
    assert not scratch.exists()
    assert agent.report().attempts == frozenset()


def test_another_heliostats_attempts_are_not_reported(agent: NodeAgent) -> None:
    with subprocess.Popen(["sleep", "600"], env={MARK_VARIABLE: "ftjob-foreign/1"}) as process:
        try:
            assert agent.report().attempts == frozenset()
        finally:
            process.kill()


def test_folders_of_jobs_long_ended_are_forgotten(agent: NodeAgent, objects: ObjectStore, tmp_path: Path) -> None:
    for job_id in ("ftjob-old", "ftjob-recent", "ftjob-there"):
        agent.stage_attempt(job_id, 1, _files(objects))
    jobs = tmp_path / "node/jobs"
    for job_id in ("ftjob-old", "ftjob-recent"):
        agent.clear_attempt(job_id, 1)
    for job_id in ("ftjob-old", "ftjob-there"):
        os.utime(jobs / job_id, (0, 0))
    agent.stage_attempt("ftjob-new", 1, {})
    assert sorted(folder.name for folder in jobs.iterdir()) == ["ftjob-new", "ftjob-recent", "ftjob-there"]


def test_files_that_come_after_the_end_of_their_attempt_do_not_stay(
    tmp_path: Path, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver is dead, its call to the agent is not."""
    files = {name: (name, objects.put_bytes(name, b"1")) for name in ("one", "two")}
    staging = Staging(tmp_path / "node", objects)
    get_file = objects.get_file

    def ended_meanwhile(key: str, path: Path, sha256: str | None = None) -> None:
        if key == "two":
            staging.clear_attempt("j1", 1)
        get_file(key, path, sha256)

    with monkeypatch.context() as patched:
        patched.setattr(objects, "get_file", ended_meanwhile)
        with pytest.raises(Unavailable):
            staging.stage_attempt("j1", 1, files)
    assert not (tmp_path / "node" / "jobs" / "j1" / "a1").exists()
    assert (staging.stage_attempt("j1", 1, files) / "two").read_bytes() == b"1"  # begun again


def test_what_a_tenant_kept_is_forgotten_a_week_after_the_last_addition(tmp_path: Path, objects: ObjectStore) -> None:
    staging = Staging(tmp_path / "node", objects)
    old, new = (tmp_path / "node" / "caches" / name for name in ("t1", "t2"))
    for cache in (old, new):
        cache.mkdir(parents=True)
        (cache / "tokens.npz").write_bytes(b"tokens")
    week_ago = time.time() - 8 * 24 * 3600
    os.utime(old, (week_ago, week_ago))
    staging.stage_attempt("ftjob-1", 1, {})
    assert (old.exists(), new.exists()) == (False, True)


def test_a_model_that_no_job_asked_for_leaves_room(
    agent: NodeAgent, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = _put_model(objects)
    with pytest.raises(Unavailable) as caught:
        agent.stage_ahead(StagedModel("models/m", sha256, 1 << 60))
    assert caught.value.code == "node_disk_full" and agent.report().node.models == frozenset()
    monkeypatch.setattr(staging, "SPARE_SHARE", 0.0)
    agent.stage_ahead(StagedModel("models/m", sha256, 1000))
    assert agent.report().node.models == {sha256}


def test_of_a_copy_that_fails_nothing_stays(
    agent: NodeAgent, objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = _put_model(objects)

    def full(self: ObjectStore, key: str, target: Path, sha256: str) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ObjectStore, "get_file", full)
    with pytest.raises(OSError, match="No space"):
        agent.stage_model("models/m", sha256)
    assert [path for path in (tmp_path / "node" / "models").rglob("*") if path.is_dir()] == []
