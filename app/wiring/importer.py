"""Of the importer of models."""

from __future__ import annotations

from app.importer import ImporterParts
from app.settings import load_settings
from app.wiring.database import database
from cluster.storage.objects import ObjectStore


def importer_parts() -> ImporterParts:
    settings = load_settings()
    return ImporterParts(database(settings, size=2), ObjectStore(settings.objects_url), settings)
