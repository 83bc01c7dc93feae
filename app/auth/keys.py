"""Where the keys that tokens are checked with come from: the built-in issuer's file, or an OIDC issuer's JWKS
document."""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, OKPKey

from cluster.errors import HeliostatError, Unavailable

MAX_AGE_S = 300.0
MIN_AGE_S = 5.0
"""An unknown key id asks for the document again, but not more often: else anybody could make us hammer the issuer."""
MAX_DOCUMENT_BYTES = 1024 * 1024
TIMEOUT_S = 5.0


class KeySource(Protocol):
    def find(self, kid: str | None) -> Any | None:
        """The key of that id; None: not one of ours. Raises `Unavailable`."""
        ...


class BuiltinKey:
    """The built-in issuer's Ed25519 key, from its file (0600)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._key: Any | None = None

    def find(self, kid: str | None) -> Any | None:
        key = self.read()
        return key if key is not None and kid == key.kid else None

    def read(self) -> Any | None:
        """None: the issuer has not been used on this machine."""
        if self._key is None and self._file.is_file():
            self._key = OKPKey.import_key(json.loads(self._file.read_text()))
        return self._key

    def read_or_make(self) -> Any:
        if (key := self.read()) is not None:
            return key
        new = OKPKey.generate_key("Ed25519", {"use": "sig", "alg": "Ed25519"}, auto_kid=True)
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = self._file.with_name(f"{self._file.name}.{secrets.token_hex(6)}")
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(new.as_dict(private=True), file)
        try:
            self._file.hardlink_to(aside)  # unlike a rename it never takes the place of another's key
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        return self.read()


class JwksKeys:
    """An issuer's public keys, kept for `MAX_AGE_S`. A new key id makes it look again at once: so keys can be
    rotated. While the issuer is down, the keys that it gave last still hold."""

    def __init__(self, url: str, max_age_s: float = MAX_AGE_S, min_age_s: float = MIN_AGE_S) -> None:
        self._url = _checked(url)
        self._max_age_s, self._min_age_s = max_age_s, min_age_s
        self._lock = threading.Lock()
        self._keys: KeySet | None = None
        self._looked_at = float("-inf")

    def find(self, kid: str | None) -> Any | None:
        with self._lock:
            age_s = time.monotonic() - self._looked_at
            found = self._by_id(kid)
            if age_s > self._max_age_s or (found is None and age_s > self._min_age_s):
                self._refresh()
                found = self._by_id(kid)
        return found

    def _by_id(self, kid: str | None) -> Any | None:
        keys = list(self._keys) if self._keys is not None else []
        if kid is None:  # a token need not name its key when there is only one
            return keys[0] if len(keys) == 1 else None
        return next((key for key in keys if key.kid == kid), None)

    def _refresh(self) -> None:
        try:
            self._keys = KeySet.import_key_set(self._fetch())
        except (httpx.HTTPError, JoseError, ValueError, KeyError, TypeError) as error:
            if self._keys is None:
                raise Unavailable(
                    f"the issuer's keys cannot be read ({type(error).__name__})",
                    code="issuer_unavailable",
                    hint="Try again in a few seconds; operators: look at auth.jwks_url.",
                ) from error
        self._looked_at = time.monotonic()

    def _fetch(self) -> Any:
        response = httpx.get(self._url, timeout=TIMEOUT_S)
        response.raise_for_status()
        if len(response.content) > MAX_DOCUMENT_BYTES:
            raise ValueError("too large")
        return response.json()


def _checked(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname)):
        return url
    raise HeliostatError(
        "auth.jwks_url must be https (http only on this machine): whoever answers it decides who gets in",
        code="insecure_setting",
        param="auth.jwks_url",
        hint="Use the issuer's https address.",
    )


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
