"""Two tenants train at once on two slots, each in its own environment, and see nothing of each other."""

from __future__ import annotations

import httpx
import psycopg
import pytest
from heliostat_service import Service, explain_failure, rows, submit, upload, wait_done, wait_for

pytestmark = pytest.mark.integration

ENVIRONMENT = """
name: greeting
dependencies:
  - pip:
      - greeter=={version}
"""


def _prepare(client: httpx.Client, version: str) -> None:
    upload(client, "first", rows(40))
    made = client.post(
        "/environments", content=ENVIRONMENT.format(version=version), headers={"content-type": "application/yaml"}
    )
    assert made.status_code == 201, made.text


def _job(client: httpx.Client) -> str:
    return submit(
        client,
        base_model="tiny",
        dataset_id="first",
        environment="greeting",
        hyperparams={"batch_size": 4, "epochs": 100, "max_steps": 40},
        resource_config={"num_gpus": 1},
    )


def test_two_tenants_at_once_with_two_versions_of_one_package(service: Service) -> None:
    """The package speaks at the start of the interpreter it is installed for: it is the training process that reports."""
    tenants = {"1.0": service.tenant("acme"), "2.0": service.tenant("globex")}
    for version, client in tenants.items():
        _prepare(client, version)
    jobs = {version: _job(client) for version, client in tenants.items()}
    for tenant, job_id in zip(("acme", "globex"), jobs.values(), strict=True):
        assert f"JobDriver(tenant={tenant}, job={job_id}, attempt=1)" in wait_for(lambda: _shown(service, 2), 300)
    for version, client in tenants.items():
        seen = wait_done(client, jobs[version])
        assert seen["status"] == "succeeded", explain_failure(service, client, jobs[version])
        log = client.get(f"/finetune/{jobs[version]}/logs").text
        other = "2.0" if version == "1.0" else "1.0"
        assert f"greeter {version} speaks" in log
        assert f"greeter {other}" not in log
    assert _leases_overlapped(service, list(jobs.values()))
    assert tenants["1.0"].get(f"/finetune/{jobs['2.0']}").status_code == 404


def _shown(service: Service, count: int) -> list[str]:
    """The drivers that the Ray dashboard shows as alive, once there are so many; it answers nobody without the token."""
    url = f"{service.state()['dashboard_url']}/logical/actors"
    assert httpx.get(url, timeout=60).status_code == 401
    token = (service.data_dir / "keys" / "ray.token").read_text()
    actors = httpx.get(url, headers={"authorization": f"Bearer {token}"}, timeout=60).json()["data"]["actors"].values()
    drivers = [
        actor["reprName"]
        for actor in actors
        if actor["className"] == "DriverActor" and actor["state"] == "ALIVE" and actor["address"]["nodeId"]
    ]
    return drivers if len(drivers) >= count and all(drivers) else []


def _leases_overlapped(service: Service, job_ids: list[str]) -> bool:
    with psycopg.connect(service.dsn()) as connection:
        spans = connection.execute(
            "SELECT granted_at, coalesce(released_at, now()) FROM leases WHERE job_id = ANY(%s)", [job_ids]
        ).fetchall()
    assert len(spans) == 2, "each job ran once"
    return max(start for start, _ in spans) < min(end for _, end in spans)
