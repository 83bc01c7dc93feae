"""What a fresh data folder needs before anybody can ask for anything: tables, the tenant `default`, two tokens in 0600 files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from app.settings import Settings

TOKEN_LIFE = timedelta(days=365)
DEFAULT_TENANT = "default"
