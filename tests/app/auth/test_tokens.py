"""Tokens of the built-in issuer and of an OIDC issuer with a real JWKS document: which hold, and which do not."""

from __future__ import annotations

import base64
import hmac
import json
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jws, jwt
from joserfc.jwk import ECKey, KeySet, OKPKey, RSAKey

from app.auth.issuer import Issuer, TokenRequest
from app.auth.keys import BuiltinKey, JwksKeys
from app.auth.verify import TokenVerifier, make_verifier
from app.db.session import Database
from app.settings import AuthSettings, Settings
from cluster.errors import HeliostatError, InvalidRequest, NotFound, Unauthorized, Unavailable

AUTH = AuthSettings(issuer="https://id.example", audience="heliostat")
RSA = RSAKey.generate_key(2048, {"kid": "rsa"})
EC = ECKey.generate_key("P-256", {"kid": "ec"})
ED = OKPKey.generate_key("Ed25519", {"kid": "ed"})


class JwksServer:
    """A JWKS document on 127.0.0.1; `keys` may change, `down` makes it answer 500."""

    def __init__(self) -> None:
        self.keys: list[Any] = [RSA, EC, ED]
        self.down = False
        self.asked = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                body = json.dumps(KeySet(server.keys).as_dict(private=False)).encode()
                self.send_response(500 if server.down else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                """Quiet."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/jwks"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def jwks() -> Iterator[JwksServer]:
    server = JwksServer()
    yield server
    server.close()


def claims(**changes: Any) -> dict[str, Any]:
    """Of a token that holds; a change to None takes a claim away."""
    now = int(time.time())
    full = {"iss": AUTH.issuer, "aud": "heliostat", "sub": "ann", "iat": now, "exp": now + 60, "tenant": "acme"}
    full |= {"role": "member", "scope": "model:read", **changes}
    return {name: value for name, value in full.items() if value is not None}


def sign(key: Any = RSA, alg: str = "RS256", **changes: Any) -> str:
    return str(jwt.encode({"alg": alg, "kid": key.kid}, claims(**changes), key, algorithms=[alg]))


def oidc(jwks: JwksServer, **times: float) -> TokenVerifier:
    return TokenVerifier(AUTH, [JwksKeys(jwks.url, **times)], lambda jti: jti == "revoked")


@pytest.fixture(scope="module")
def offline() -> TokenVerifier:
    """Its keys are read already."""

    class Fixed:
        def find(self, kid: str | None) -> Any | None:
            return {"rsa": RSA, "ec": EC, "ed": ED}.get(kid or "")

    return TokenVerifier(AUTH, [Fixed()], lambda jti: jti == "revoked")


@pytest.mark.parametrize(("key", "alg"), [(RSA, "RS256"), (EC, "ES256"), (ED, "Ed25519")])
def test_an_oidc_token_makes_an_identity(jwks: JwksServer, key: Any, alg: str) -> None:
    identity = oidc(jwks).verify(sign(key, alg, jti="j1"))
    assert (identity.tenant, identity.subject, identity.role, identity.jti) == ("acme", "ann", "member", "j1")
    assert identity.scopes == {"model:read"}


def test_the_old_name_of_ed25519_is_accepted(offline: TokenVerifier) -> None:
    with pytest.warns(match="EdDSA is deprecated"):  # of the signer
        token = sign(ED, "EdDSA")
    assert offline.verify(token).tenant == "acme"


def test_without_role_a_token_may_only_look(offline: TokenVerifier) -> None:
    assert offline.verify(sign(role=None, scope=None)).role == "viewer"


NOW = int(time.time())
BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "no iss": {"iss": None},
    "other iss": {"iss": "https://evil.example"},
    "no aud": {"aud": None},
    "other aud": {"aud": ["other"]},
    "aud is a number": {"aud": 7},
    "no sub": {"sub": None},
    "sub is a list": {"sub": ["ann"]},
    "no exp": {"exp": None},
    "expired": {"exp": NOW - 3600},
    "exp is text": {"exp": "tomorrow"},
    "no iat": {"iat": None},
    "from the future": {"iat": NOW + 3600},
    "not yet": {"nbf": NOW + 3600},
    "no tenant": {"tenant": None},
    "tenant is a path": {"tenant": "../x"},
    "tenant is a list": {"tenant": ["acme"]},
    "platform role for a tenant": {"role": "operator"},
    "unknown role": {"role": "king"},
    "role is a list": {"role": ["admin"]},
    "platform audience with a tenant": {"aud": "heliostat-platform", "role": "operator"},
    "both audiences": {"aud": ["heliostat", "heliostat-platform"], "role": "operator"},
    "tenant role for the platform": {"aud": "heliostat-platform", "tenant": None, "role": "admin"},
    "jti is a number": {"jti": 7},
    "revoked": {"jti": "revoked"},
}


@pytest.mark.parametrize("changes", BAD_CLAIMS.values(), ids=BAD_CLAIMS)
def test_a_token_with_a_wrong_claim_does_not_hold(offline: TokenVerifier, changes: dict[str, Any]) -> None:
    token = sign(**changes)
    with pytest.raises(Unauthorized) as caught:
        offline.verify(token)
    assert token not in str(caught.value) and "ann" not in str(caught.value)


def test_the_platform_s_tokens_have_an_audience_of_their_own(offline: TokenVerifier) -> None:
    identity = offline.verify(sign(aud="heliostat-platform", tenant=None, role="operator"))
    assert (identity.tenant, identity.role) == (None, "operator")


def test_clocks_may_differ_by_the_leeway(offline: TokenVerifier) -> None:
    now = int(time.time())
    assert offline.verify(sign(exp=now - 10, iat=now + 10, nbf=now + 10)).tenant == "acme"


def _encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def test_algorithms_are_pinned(offline: TokenVerifier) -> None:
    none = f"{_encoded({'alg': 'none', 'kid': 'rsa'})}.{_encoded(claims())}."
    signed = f"{_encoded({'alg': 'HS256', 'kid': 'rsa'})}.{_encoded(claims())}"
    mac = hmac.digest(RSA.as_pem(private=False), signed.encode(), "sha256")  # the classic: the public key as a secret
    confused = f"{signed}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    wrong_kind = jwt.encode({"alg": "ES256", "kid": "rsa"}, claims(), EC, algorithms=["ES256"])
    weaker = jwt.encode({"alg": "RS512", "kid": "rsa"}, claims(), RSA, algorithms=["RS512"])
    for token in (none, confused, wrong_kind, weaker):
        with pytest.raises(Unauthorized):
            offline.verify(token)


def test_a_token_of_another_key_or_changed_on_the_way_does_not_hold(offline: TokenVerifier) -> None:
    stranger = RSAKey.generate_key(2048, {"kid": "rsa"})
    head, body, tail = sign().split(".")
    other = _encoded(claims(role="admin"))
    for token in (sign(stranger), f"{head}.{other}.{tail}", f"{head}.{body}.{tail[:-4]}AAAA", f"{head}.{body}."):
        with pytest.raises(Unauthorized):
            offline.verify(token)


def test_a_signed_text_that_is_no_object_does_not_hold(offline: TokenVerifier) -> None:
    for payload in (b"[]", b"7", b"\xff", b'"x"'):
        token = jws.serialize_compact({"alg": "RS256", "kid": "rsa"}, payload, RSA, algorithms=["RS256"])
        with pytest.raises(Unauthorized):
            offline.verify(token)


@given(st.text(max_size=60) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}"))
def test_noise_does_not_hold(offline: TokenVerifier, noise: str) -> None:
    with pytest.raises(Unauthorized):
        offline.verify(noise)


HEADERS = st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=2), max_leaves=4)


@given(st.dictionaries(st.sampled_from(["alg", "kid", "crit", "b64", "typ", "jwk", "x5c"]), HEADERS) | HEADERS)
def test_strange_headers_do_not_hold(offline: TokenVerifier, header: Any) -> None:
    with pytest.raises(Unauthorized):
        offline.verify(f"{_encoded(header)}.{_encoded(claims())}.AAAA")


def test_keys_are_kept_and_rotated(jwks: JwksServer) -> None:
    verifier = oidc(jwks, min_age_s=0.0)
    for _ in range(3):
        verifier.verify(sign())
    assert jwks.asked == 1
    new = ECKey.generate_key("P-256", {"kid": "new"})
    jwks.keys = [new]
    assert verifier.verify(sign(new, "ES256")).tenant == "acme"  # an unknown key id: look again
    assert jwks.asked == 2
    with pytest.raises(Unauthorized):
        verifier.verify(sign())  # the old key is gone


def test_unknown_key_ids_do_not_hammer_the_issuer(jwks: JwksServer) -> None:
    verifier = oidc(jwks)
    stranger = RSAKey.generate_key(2048, {"kid": "stranger"})
    token = sign(stranger)
    for _ in range(5):
        with pytest.raises(Unauthorized):
            verifier.verify(token)
    assert jwks.asked == 1


def test_known_keys_hold_while_the_issuer_is_down(jwks: JwksServer) -> None:
    jwks.down = True
    verifier = oidc(jwks, max_age_s=0.0, min_age_s=0.0)
    with pytest.raises(Unavailable):
        verifier.verify(sign())
    jwks.down = False
    verifier.verify(sign())
    jwks.down = True
    assert verifier.verify(sign()).tenant == "acme"


@pytest.mark.parametrize("url", ["http://id.example/jwks", "file:///etc/passwd", "http://127.0.0.1.evil.example/"])
def test_keys_come_over_https_or_from_this_machine(url: str) -> None:
    with pytest.raises(HeliostatError, match="https"):
        JwksKeys(url)


# The built-in issuer


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("HELIOSTAT_CONFIG_FILE", raising=False)
    return Settings(data_dir=tmp_path)


def test_an_issued_token_holds_until_it_is_revoked(settings: Settings, database: Database) -> None:
    issuer, verifier = Issuer(settings, database), make_verifier(settings, database)
    new = issuer.create(TokenRequest("acme", role="viewer", expires_in_s=60))
    identity = verifier.verify(new.token)
    assert (identity.tenant, identity.role, identity.jti) == ("acme", "viewer", new.jti)
    assert identity.scopes == {"model:read", "dataset:read", "log:read"}
    assert new.token not in repr(new)
    issuer.ledger.revoke(new.jti, "acme")
    issuer.ledger.revoke(new.jti, "acme")
    with pytest.raises(Unauthorized) as caught:
        verifier.verify(new.token)
    assert caught.value.code == "token_revoked"


def test_a_tenant_lists_and_revokes_its_own_tokens_only(settings: Settings, database: Database) -> None:
    issuer = Issuer(settings, database)
    mine, theirs = issuer.create(TokenRequest("acme")), issuer.create(TokenRequest("rival"))
    operators = issuer.create(TokenRequest(None, role="operator"))
    assert [token.jti for token in issuer.ledger.list("acme")] == [mine.jti]
    assert {token.jti for token in issuer.ledger.list()} == {mine.jti, theirs.jti, operators.jti}
    for jti in (theirs.jti, operators.jti, "tok-none"):
        with pytest.raises(NotFound):
            issuer.ledger.revoke(jti, "acme")


def test_the_operator_s_token_has_no_tenant(settings: Settings, database: Database) -> None:
    new = Issuer(settings, database).create(TokenRequest(None, role="operator"))
    identity = make_verifier(settings, database).verify(new.token)
    assert (identity.tenant, identity.role) == (None, "operator")


@pytest.mark.parametrize(
    "request_",
    [
        TokenRequest("acme", role="operator"),
        TokenRequest(None, role="admin"),
        TokenRequest("acme", role="king"),
        TokenRequest("acme", scope="model:fly"),
        TokenRequest("acme", expires_in_s=0),
        TokenRequest("acme", expires_in_s=10**12),
        TokenRequest("../acme"),
    ],
)
def test_what_cannot_be_issued(settings: Settings, database: Database, request_: TokenRequest) -> None:
    with pytest.raises(InvalidRequest):
        Issuer(settings, database).create(request_)


def test_one_key_is_made_however_many_ask(tmp_path: Path) -> None:
    file = tmp_path / "keys" / "issuer.json"
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: BuiltinKey(file).read_or_make().kid, range(16)))
    assert len(ids) == 1
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["issuer.json"]


def test_where_the_issuer_is_switched_off_its_tokens_do_not_hold(settings: Settings, database: Database) -> None:
    token = Issuer(settings, database).create(TokenRequest("acme")).token
    production = settings.model_copy(update={"auth": settings.auth.model_copy(update={"builtin": False})})
    with pytest.raises(Unauthorized):
        make_verifier(production, database).verify(token)
