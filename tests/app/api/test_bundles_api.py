"""Environments as files, over HTTP."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import httpx
from builders_api import Api, moved_in
from waiting import until

from app.db.session import Database

SPEC = "name: mine\ndependencies:\n  - python\n"


def bundle_of(client: httpx.Client, ref: str = "mine") -> bytes:
    answer = client.get(f"/environments/{ref}/bundle")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/gzip"), answer.text
    return answer.content


def send(client: httpx.Client, content: bytes) -> httpx.Response:
    return client.post("/environments/import", files={"file": ("mine.tar.gz", content)})


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def test_out_and_in_again(api: Api) -> None:
    with api.client("acme") as acme, api.client("rival") as rival:
        made = acme.post("/environments", json={"spec": SPEC}).json()
        bundle = bundle_of(acme)
        answer = send(rival, bundle)
        theirs = answer.json()
        assert answer.status_code == 201 and answer.headers["location"].endswith(theirs["id"])
        assert (theirs["ref"], theirs["signed_by"]) == ("mine@1", "this Heliostat")
        assert (theirs["fingerprint"], theirs["spec"]) == (made["fingerprint"], SPEC)
        assert send(rival, bundle).json()["id"] == theirs["id"]
        assert bundle_of(rival) == bundle, "the same environment, the same bytes"
        until(lambda: list((api.settings.data_dir / "cache" / "bundles").iterdir()) == [])


def test_what_the_killed_left_goes(api: Api) -> None:
    scratch = api.settings.data_dir / "cache" / "bundles"
    for name in ("bundle-old", "import-old", "import-new"):
        (scratch / name).mkdir(parents=True)
        (scratch / name / "file").touch()
        if name.endswith("old"):
            os.utime(scratch / name, (1_700_000_000,) * 2)
    with api.client() as client:
        send(client, b"")
    assert [path.name for path in scratch.iterdir()] == ["import-new"]  # somebody may be at it


def test_what_was_changed_or_is_none(api: Api) -> None:
    with api.client() as client:
        client.post("/environments", json={"spec": SPEC})
        content = gzip.decompress(bundle_of(client))
        changed = gzip.compress(content.replace(b"name: mine", b"name: nine"))
        for wrong in (changed, content, b"", b"PK"):
            answer = send(client, wrong)
            assert (answer.status_code, code(answer)) == (422, "environment_bundle_invalid")
        for form in ({"name": "x"}, {"nmae": "x"}):
            files = {"file": ("mine.tar.gz", b"")}
            assert client.post("/environments/import", files=files, data=form).status_code == 422
        assert client.post("/environments/import", json={}).status_code == 415
        assert [one["ref"] for one in client.get("/environments").json()["data"]] == ["mine@1"]
    with api.client(role="viewer") as viewer:
        assert send(viewer, b"").status_code == 403


def test_from_another_heliostat(api: Api, database: Database, tmp_path: Path) -> None:
    """Only once an operator trusts its key."""
    with api.client() as client:
        client.post("/environments", json={"spec": SPEC})
        bundle = bundle_of(client)
    with moved_in(api, database, tmp_path / "other") as other, other.client() as client:
        answer = send(client, bundle)
        assert (answer.status_code, code(answer)) == (422, "environment_bundle_untrusted")
        key = answer.json()["error"]["message"].split("the key ")[1].split(",")[0]
        other.settings.environments.trusted_keys["paris"] = key
        assert send(client, bundle).json()["signed_by"] == "paris"


def test_no_more_than_is_allowed(api: Api) -> None:
    api.settings.environments.max_bundle_gb = 1e-6
    with api.client() as client:
        assert (answer := send(client, b"\0" * 200_000)).status_code == 413, answer.text
