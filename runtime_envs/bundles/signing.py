"""Who made a bundle: Ed25519 keys. A deployment's own lies in a file (0600) that is made on first use; others' public keys are
trusted when an operator says so."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from runtime_envs.errors import BUNDLE_INVALID, BUNDLE_UNTRUSTED, EnvironmentProblem

OWN = "this Heliostat"


@dataclass(frozen=True)
class Signature:
    """`key`: the public key; both in Base64."""

    key: str
    signature: str


@dataclass(frozen=True)
class SigningKey:
    """`file` must be the same for all replicas of a deployment. Raises OSError, ValueError for what is no key."""

    file: Path

    def sign(self, data: bytes) -> Signature:
        key = self._read_or_make()
        return Signature(_public_text(key), _text(key.sign(data)))

    def public(self) -> str:
        return _public_text(self._read_or_make())

    def _read_or_make(self) -> Ed25519PrivateKey:
        if not self.file.is_file():
            _write_once(self.file)
        key = load_pem_private_key(self.file.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{self.file} is not an Ed25519 key")
        return key


def _write_once(file: Path) -> None:
    """Of two who make it at once, the first one's stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    aside = file.with_name(f"{file.name}.{os.getpid()}-{os.urandom(4).hex()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as target:
        target.write(pem)
        target.flush()
        os.fsync(target.fileno())
    try:
        file.hardlink_to(aside)
    except FileExistsError:
        pass
    finally:
        aside.unlink()


@dataclass(frozen=True)
class Trust:
    """`own`: our public key; `others`: name → public key, as an operator has written them."""

    own: str
    others: Mapping[str, str]

    def signer(self, signature: Signature, data: bytes) -> str:
        """Its name. Raises `environment_bundle_untrusted`, `environment_bundle_invalid` when the signature is not of this key."""
        names = {key: name for name, key in self.others.items()} | {self.own: OWN}
        name = names.get(signature.key)
        if name is None:
            raise EnvironmentProblem(
                BUNDLE_UNTRUSTED, f"The bundle is signed by the key {signature.key[:64]}, which nobody here trusts.",
                hint="An operator who knows whose key it is adds it to `environments.trusted_keys`.",
            )  # fmt: skip
        try:
            key = Ed25519PublicKey.from_public_bytes(base64.b64decode(signature.key, validate=True))
            key.verify(base64.b64decode(signature.signature, validate=True), data)
        except (InvalidSignature, ValueError):
            raise EnvironmentProblem(
                BUNDLE_INVALID, f"The signature is not of what the bundle holds, though it names the key of {name}.",
                hint="It was changed after it was signed: export it again.",
            ) from None  # fmt: skip
        return name


def _public_text(key: Ed25519PrivateKey) -> str:
    return _text(key.public_key().public_bytes_raw())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
