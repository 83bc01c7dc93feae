"""Datasets, models, base models, environments, tokens, the cluster."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cli_said import Run
from fake_service import FakeService, error

ENVIRONMENT = {"id": "env-1", "name": "mine", "version": 1, "fingerprint": "f" * 64, "created_at": 1, "python": "3.11"}


def rows_file(folder: Path, rows: int = 3) -> Path:
    file = folder / "My Rows.jsonl"
    file.write_text('{"prompt":"a","completion":"b"}\n' * rows)
    return file


def test_upload_sends_the_file_and_shows_what_became_of_it(cli: Run, service: FakeService, tmp_path: Path) -> None:
    file = rows_file(tmp_path, 20_000)
    said = cli("dataset", "upload", str(file), "--map", "prompt=question", "--map", "completion=answer")
    assert said.code == 0
    assert service.bodies[0]["data"] == file.read_bytes()
    assert service.bodies[0]["name"] == "my-rows"
    assert service.bodies[0]["map"] == ["prompt=question", "completion=answer"]
    assert "20,000" in said.out
    assert "assistant: «yo»" in said.out
    assert "user: hi" in said.out


def test_upload_is_sent_again_from_the_start(cli: Run, service: FakeService, tmp_path: Path) -> None:
    service.answers = [error(503, "unavailable", "later", headers={"retry-after": "0"})]
    file = rows_file(tmp_path)
    said = cli("datasets", "upload", str(file), "--name", "rows", "--json")
    assert said.json["name"] == "rows"
    assert said.json["preview"][0]["spans"][1]["loss"] is True
    assert service.bodies[0]["data"] == file.read_bytes()


def test_upload_of_nothing_is_wrong_use(cli: Run) -> None:
    assert cli("dataset", "upload", "/nowhere.jsonl").code == 2


def test_download_is_checked_and_unpacked(cli: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said = cli("models", "download", "tuned@1", "--out", str(folder), "--json")
    assert said.code == 0
    assert (folder / "adapter.bin").read_bytes() == b"weights" * 1000
    assert cli("models", "download", "tuned@1", "--out", str(folder)).code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_form_is_downloaded_by_name(cli: Run, tmp_path: Path) -> None:
    assert cli("models", "download", "tuned", "--output", "merged", "--out", str(tmp_path / "out")).code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged.bin"]


def test_download_as_tar(cli: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.tar"
    assert cli("models", "download", "tuned", "--tar", "-o", str(file)).code == 0
    assert file.stat().st_size > 7000


def test_a_damaged_download_leaves_nothing(cli: Run, service: FakeService, tmp_path: Path) -> None:
    service.damaged = True
    said = cli("models", "download", "tuned", "--out", str(tmp_path / "out"))
    assert said.code == 1
    assert "sha256" in said.err
    assert list(tmp_path.iterdir()) == []


def test_models(cli: Run, service: FakeService) -> None:
    model = {"id": "model-1", "name": "tuned", "latest_version": 2, "aliases": {"prod": 1}, "created_at": 1}
    version = {"id": "mv-1", "name": "tuned", "version": 2, "kind": "adapter", "job_id": "ftjob-9", "metrics": {}}
    service.objects = {
        "GET /models": {"data": [model], "has_more": False},
        "GET /models/tuned": model,
        "GET /models/tuned/versions": {"data": [version], "has_more": False},
        "PUT /models/tuned/aliases/prod": version,
        "POST /models/tuned/rollback": {**version, "version": 1},
        "DELETE /models/tuned": {"deleted": True},
    }
    assert "prod=1" in cli("model", "ls").out
    assert "ftjob-9" in cli("models", "show", "tuned").out
    assert "tuned@prod is now version 2" in cli("models", "promote", "tuned@2").out
    assert service.bodies[-1] == {"version": 2}
    assert "version 1" in cli("models", "rollback", "tuned").out
    assert cli("models", "delete", "tuned").code == 0


def test_base_model_add_waits_until_it_is_ready(cli: Run, service: FakeService, tmp_path: Path) -> None:
    states = iter(["preparing", "ready"])
    service.objects = {
        "POST /base-models": {"id": "bm-1", "name": "tiny", "status": "preparing"},
        "GET /base-models/tiny": lambda: {
            "id": "bm-1",
            "name": "tiny",
            "status": next(states),
            "parameters": 135_000_000,
        },
    }
    said = cli("base-model", "add", "tiny", str(tmp_path))
    assert said.code == 0
    assert "135.0 M" in said.out
    assert service.bodies[0] == {"name": "tiny", "source": str(tmp_path)}


def test_base_model_that_fails_is_1(cli: Run, service: FakeService) -> None:
    failed = {"name": "tiny", "status": "failed", "error": {"code": "bad", "message": "pickle", "hint": "convert it"}}
    service.objects["POST /base-models"] = failed
    said = cli("base-model", "add", "tiny", "org/model")
    assert said.code == 1
    assert "pickle" in said.err
    assert "convert it" in said.err


def test_base_model_of_a_missing_path_is_told_before_it_is_sent(cli: Run, service: FakeService) -> None:
    assert "there is no file" in cli("base-model", "add", "tiny", "./nowhere").err
    assert service.requests == []


def test_environments(cli: Run, service: FakeService, tmp_path: Path) -> None:
    file = tmp_path / "environment.yml"
    file.write_text("name: mine\n")
    service.objects = {
        "POST /environments": ENVIRONMENT,
        "POST /environments/mine/update": {**ENVIRONMENT, "version": 2},
        "GET /environments": {"data": [ENVIRONMENT], "has_more": False},
        "GET /environments/mine": {
            **ENVIRONMENT,
            "spec": "name: mine",
            "packages": [{"name": "six", "version": "1.16"}],
            "diff": {"added": [], "removed": [], "changed": [{"name": "six", "before": "1.16", "after": "1.17"}]},
        },
        "DELETE /environments/mine": {},
    }
    assert "mine@1" in cli("env", "create", "-f", str(file)).out
    assert service.bodies[-1] == {"spec": "name: mine\n"}
    assert "mine@2" in cli("env", "add", "mine", "six==1.17", "attrs").out
    assert service.bodies[-1] == {"add": ["six==1.17", "attrs"]}
    assert "mine@1" in cli("environments", "list").out
    assert "six" in cli("env", "show", "mine").out
    assert "1.17" in cli("env", "diff", "mine", "mine@1").out
    assert cli("env", "rm", "mine").code == 0


def test_environments_are_checked_by_an_older_service_too(cli: Run, service: FakeService) -> None:
    failed = {"node": "n1", "status": "failed", "damaged": [], "error": "it was killed"}  # `hint` came later
    service.objects["POST /environments/mine/verify"] = {"ok": False, "nodes": [failed]}
    said = cli("env", "verify", "mine")
    assert said.code == 1 and "it was killed" in said.out
    failed["hint"] = "check it again"
    assert "it was killed check it again" in cli("env", "verify", "mine").out


def test_token_create(cli: Run, service: FakeService, tmp_path: Path) -> None:
    service.objects["POST /tokens"] = {"id": "tok-1", "token": "the-token", "role": "member"}
    said = cli(
        "token", "create", "--tenant", "acme", "--role", "member", "--scope", "model:read", "--expires-in", "24h"
    )
    assert said.out == "the-token\n"
    assert service.bodies[-1] == {"tenant": "acme", "role": "member", "scope": "model:read", "expires_in": 86400}
    assert service.requests[-1] == ("POST", "/tokens", {})  # acme need not exist yet: nobody acts for it
    file = tmp_path / "token"
    said = cli("token", "create", "--tenant", "acme", "--out", str(file))
    assert "the-token" not in said.out + said.err
    assert file.read_text() == "the-token\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_token_ls_and_revoke(cli: Run, service: FakeService) -> None:
    token = {"id": "tok-1", "tenant": "acme", "subject": "eve", "role": "member", "scope": "x", "expires_at": 1}
    service.objects = {"GET /tokens": {"data": [token], "has_more": False}, "DELETE /tokens/tok-1": {}}
    assert "eve" in cli("token", "ls").out
    assert "tok-1 is revoked" in cli("tokens", "revoke", "tok-1").out


def test_the_cluster(cli: Run, service: FakeService) -> None:
    here = {"id": "cpu", "available": True, "slots": 2}
    service.objects = {
        "GET /queue": {"data": [{"position": 1, "id": "ftjob-4"}]},
        "GET /shares": {"data": []},
        "GET /nodes": {"data": [{"id": "node-a", "kind": "cpu", "slots": 2, "seen_at": 1}]},
        "GET /gpu-types": {"data": [here, {"id": "A100", "available": False, "slots": 0}]},
        "GET /me": {"tenant": "acme", "role": "admin"},
    }
    assert "ftjob-4" in cli("queue").out
    assert "node-a" in cli("nodes").out
    assert "A100" not in cli("gpus").out
    assert "A100" in cli("gpu", "--all").out
    assert "acme" in cli("whoami").out


def test_an_operator_acts_for_a_tenant(cli: Run, service: FakeService) -> None:
    service.objects = {"GET /queue": {"data": []}, "GET /shares": {"data": []}}
    assert cli("queue", "--tenant", "acme").code == 0
    assert service.seen("GET", "/queue") == [{"tenant_id": "acme"}]


@pytest.mark.parametrize("path", ["estimate", "doctor", "context"])
def test_help_everywhere(offline: Run, path: str) -> None:
    assert "--json" in offline(path, "--help").out
