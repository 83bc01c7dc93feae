"""Whether the process lives, and whether it can serve. Open to everyone: says nothing else."""

from __future__ import annotations

from fastapi import APIRouter

from app.deps import ServicesDep

router = APIRouter(tags=["service"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz")
def readyz(services: ServicesDep) -> dict[str, str]:
    """503 while the database does not answer."""
    services.parts.database.ping()
    return {"status": "ready"}
