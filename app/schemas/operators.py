"""Bodies of what operators and admins send: base models, tokens; and of small actions."""

from __future__ import annotations

from typing import Annotated, Literal

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
