"""The identity of an environment: SHA-256 of its lock in canonical form. Two equal locks are one prefix on a node."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

PLACES = ("pixi", "bundled")
"""Parts of a lock that say where packages are, not what they are."""
FINGERPRINT = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def fingerprint_of(lock: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(lock)).hexdigest()


def identity(lock: dict[str, Any]) -> str:
    """The fingerprint. Without the places: a mirror that moves does not make another environment."""
    return fingerprint_of({key: value for key, value in lock.items() if key not in PLACES})


def dependency_md5_of(lock: dict[str, Any]) -> str:
    """Of the effective `name==version` lines and the Python: equal for environments that import the same packages,
    however they came about. For people and dashboards; nothing relies on MD5."""
    own = {package["name"]: package["version"] for package in (*lock.get("conda", ()), *lock["pip"])}
    versions = dict(lock["base"]["packages"]) | own
    lines = [f"python=={lock['python']}", *(f"{name}=={version}" for name, version in sorted(versions.items()))]
    return hashlib.md5("\n".join(lines).encode(), usedforsecurity=False).hexdigest()
