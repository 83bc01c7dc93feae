"""The HTTP API as a Ray Serve deployment: HAProxy in front, requests go straight to the replicas' own HTTP servers, so that
bodies never pass through Ray's object store."""

from __future__ import annotations

from typing import Any

from ray import serve

from app.settings import Settings

APPLICATION = "heliostat"
MAX_ONGOING_REQUESTS = 1000
"""A follower of events holds one for hours; Serve's default of 5 would fill a replica with five watchers."""


def _build() -> Any:
    # Runs in the replica: only there are the database, the keys and FastAPI needed.
    from app.wiring.api import http_app

    return http_app()


class Api:
    """One replica of the API."""


_deployment: Any = serve.deployment(
    name="api",
    max_ongoing_requests=MAX_ONGOING_REQUESTS,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=2,
    ray_actor_options={"num_cpus": 0, "resources": {"heliostat_control": 0.001}},
)(serve.ingress(_build)(Api))


def deploy(settings: Settings) -> None:
    """Starts Serve and the API, or finds them; blocks until the API is ready. Needs a connected Ray."""
    serve.start(
        http_options={"host": settings.http.host, "port": settings.http.port, "location": "HeadOnly"},
    )
    serve.run(
        _deployment.options(num_replicas=settings.http.replicas).bind(),
        name=APPLICATION,
        route_prefix="/",
        logging_config={"enable_access_log": False},
    )


def healthy() -> bool:
    """Whether Serve says that the API runs."""
    applications = serve.status().applications
    return APPLICATION in applications and applications[APPLICATION].status == "RUNNING"
