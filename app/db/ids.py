"""Makes ids: a prefix that says what it is, and 120 random bits in lower-case letters and digits."""

from __future__ import annotations

import base64
import secrets

JOB = "ftjob-"
DATASET = "file-"
ENVIRONMENT = "env-"
CODE = "code-"
BASE_MODEL = "base-"
MODEL = "model-"
MODEL_VERSION = "mv-"
EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"


def new_id(prefix: str) -> str:
    return prefix + base64.b32encode(secrets.token_bytes(15)).decode().lower()
