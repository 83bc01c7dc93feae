"""Bodies of what operators and admins send: base models, tokens; and of small actions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, model_validator

from app.schemas.common import Name, RequestBody, Text

Label = Annotated[Text, Field(min_length=1, max_length=200)]


class NewBaseModel(RequestBody):
    name: Name
    source: Annotated[Text, Field(min_length=1, max_length=4096)]
    """A Hugging Face folder, a GGUF file, or a hub id."""
    chat_template: Annotated[Text, Field(max_length=100_000)] | None = None


class NewToken(RequestBody):
    tenant: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] | None = None
    role: Literal["viewer", "member", "admin", "operator", "auditor"] | None = None
    scope: Annotated[Text, Field(min_length=1, max_length=4000)] | None = None
    expires_in: int | None = Field(None, ge=1, le=10 * 366 * 24 * 3600, description="Seconds; a day if left out.")
    subject: Label | None = None


class TenantChange(RequestBody):
    """Left out: as it is; null: the default."""

    SYNONYMS: ClassVar[dict[str, str]] = {
        "max_queued": "max_queued_jobs",
        "gpu_hours_month": "gpu_hours_per_month",
    }

    weight: float | None = Field(None, ge=0.001, le=1000, description="Of its fair share; 1 if null.")
    guaranteed_slots: int | None = Field(None, ge=0, le=1_000_000, description="Its own; lent while it needs them not.")
    max_slots: int | None = Field(None, ge=0, le=1_000_000, description="At a time; null: no limit.")
    urgent_slots: int | None = Field(
        None, ge=0, le=1_000_000, description="For urgent jobs; beyond them they count as high. Null: the usual share."
    )
    max_queued_jobs: int | None = Field(None, ge=0, le=10_000_000)
    gpu_hours_per_month: float | None = Field(None, ge=0, le=1e9, description="Calendar month, UTC; null: no limit.")


class Promotion(RequestBody):
    version: Annotated[int, Field(ge=1, le=2**31 - 1)] | Label


class Rollback(RequestBody):
    alias: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")] = "prod"


class NewEnvironment(RequestBody):
    spec: Annotated[Text, Field(min_length=1, max_length=65536)]
    """environment.yml as text."""


class EnvironmentChange(RequestBody):
    """One of the two."""

    spec: Annotated[Text, Field(min_length=1, max_length=65536)] | None = None
    add: Annotated[list[Label], Field(min_length=1, max_length=100)] | None = None

    @model_validator(mode="after")
    def _one_of(self) -> EnvironmentChange:
        if (self.spec is None) == (self.add is None):
            raise ValueError("give either spec or add")
        return self
