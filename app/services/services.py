"""All services together, made once a process."""

from __future__ import annotations

from typing import Protocol

from app.auth.issuer import Issuer
from app.auth.permissions import Identity
from app.services.access import Access, Caller
from app.services.base_models import BaseModelService
from app.services.bundles import BundleService
from app.services.cluster import ClusterService
from app.services.code import CodeService
from app.services.datasets import DatasetService
from app.services.environments import EnvironmentService
from app.services.events import EventService
from app.services.jobs import JobService
from app.services.line import LineService
from app.services.models import ModelService
from app.services.parts import Parts
from app.services.queue import QueueService
from app.services.tenants import TenantService
from app.services.tokens import TokenService


class Verifier(Protocol):
    def verify(self, token: str) -> Identity: ...


class Services:
    def __init__(self, parts: Parts, verifier: Verifier, issuer: Issuer | None) -> None:
        self.parts = parts
        self._verifier = verifier
        self._access = Access(parts)
        line = LineService(parts.database, parts.settings.scheduler.policy())
        self.jobs = JobService(parts, self._access, line)
        self.events = EventService(parts)
        self.queue = QueueService(parts, line)
        self.datasets = DatasetService(parts)
        self.code = CodeService(parts)
        self.environments = EnvironmentService(parts)
        self.bundles = BundleService(parts)
        self.models = ModelService(parts)
        self.base_models = BaseModelService(parts)
        self.tokens = TokenService(issuer)
        self.cluster = ClusterService(parts)
        self.tenants = TenantService(parts)

    def identify(self, token: str, tenant_id: str | None) -> Caller:
        """Raises `Unauthorized`, and `Forbidden` when `tenant_id` is another tenant's."""
        return self._access.known(Caller(self._verifier.verify(token)).for_tenant(tenant_id))

    @property
    def max_upload_bytes(self) -> int:
        return self.parts.settings.http.max_upload_bytes

    def close(self) -> None:
        self.parts.changes.close()
