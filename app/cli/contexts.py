"""Where the service is and who asks: flags beat the environment, that beats the context file (TOML, mode 0600)."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import platformdirs

from cluster.errors import InvalidRequest, NotFound

DEFAULT_URL = "http://127.0.0.1:8000"
OPERATOR = "operator"


@dataclass(frozen=True)
class Context:
    """A service and a way to it. `token_file` is read at each use, so that a renewed token counts at once."""

    url: str
    token: str | None = None
    token_file: str | None = None
    tenant: str | None = None


@dataclass(frozen=True)
class Contexts:
    current: str | None = None
    contexts: Mapping[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        if name not in self.contexts:
            known = ", ".join(sorted(self.contexts)) or "none yet; `heliostat up` makes the first"
            raise NotFound(f"no context is called {name!r}", code="unknown_context", hint=f"known: {known}")
        return self.contexts[name]

    def with_context(self, name: str, context: Context) -> Contexts:
        return replace(self, contexts={**self.contexts, name: context})

    def without(self, name: str) -> Contexts:
        left = {key: value for key, value in self.contexts.items() if key != name}
        return Contexts(None if self.current == name else self.current, left)


def contexts_file() -> Path:
    return platformdirs.user_config_path("heliostat") / "contexts.toml"


def load_contexts(file: Path | None = None) -> Contexts:
    """Raises InvalidRequest for a file that is not ours."""
    file = file or contexts_file()
    if not file.is_file():
        return Contexts()
    try:
        data = tomllib.loads(file.read_text())
        contexts = {name: Context(**table) for name, table in data.get("contexts", {}).items()}
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise InvalidRequest(f"{file} cannot be read: {error}", hint="mend it or remove it") from error
    return Contexts(data.get("current"), contexts)


def save_contexts(contexts: Contexts, file: Path | None = None) -> Path:
    """Written aside with mode 0600 and renamed: a token is never readable by others, a crash leaves the old file."""
    file = file or contexts_file()
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor, aside = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as sink:
        sink.write(_toml(contexts))
    Path(aside).replace(file)
    return file


def _toml(contexts: Contexts) -> str:
    lines = [f"current = {_quoted(contexts.current)}"] if contexts.current else []
    for name, context in contexts.contexts.items():
        lines.append(f"\n[contexts.{_quoted(name)}]")
        lines += [f"{key} = {_quoted(value)}" for key, value in vars(context).items() if value is not None]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML string but for DEL


@dataclass(frozen=True)
class Given:
    """The global options of a command line."""

    url: str | None = None
    token_file: Path | None = None
    context: str | None = None
    tenant: str | None = None
    json: bool = False

    @classmethod
    def of(cls, *, token_file: str | None, **others: Any) -> Given:
        return cls(token_file=Path(token_file).expanduser() if token_file else None, **others)

    def over(self, other: Given) -> Given:
        return Given(
            self.url or other.url,
            self.token_file or other.token_file,
            self.context or other.context,
            self.tenant or other.tenant,
            self.json or other.json,
        )


@dataclass(frozen=True)
class Connection:
    """`tenant`: for whom an operator acts. `context`: the name of the one that took part."""

    url: str
    token: str | None
    tenant: str | None = None
    context: str | None = None


def resolve(given: Given, environ: Mapping[str, str], contexts: Contexts, *, operator: bool = False) -> Connection:
    """`operator`: the command is an operator's; without a word from the user, the context `operator` of the same service is
    taken when there is one. A context's token goes to that context's URL only."""
    name = given.context or environ.get("HELIOSTAT_CONTEXT") or contexts.current
    context = contexts.get(name) if name else None
    environ = {} if given.context else environ  # a context named on the command line beats the environment
    url = given.url or environ.get("HELIOSTAT_URL") or (context.url if context else DEFAULT_URL)
    url = url.rstrip("/")
    token = _token_of_flags(given) or _token_of_environment(environ)
    if token is None and context is not None and context.url.rstrip("/") == url:
        unsaid = not given.context and not environ.get("HELIOSTAT_CONTEXT")
        if operator and unsaid and (other := contexts.contexts.get(OPERATOR)) and other.url.rstrip("/") == url:
            name, context = OPERATOR, other
        token = _token_of_context(context)
    tenant = given.tenant or (context.tenant if context else None)
    return Connection(url, token, tenant, name)


def _token_of_flags(given: Given) -> str | None:
    return read_token(given.token_file, "--token-file") if given.token_file else None


def _token_of_environment(environ: Mapping[str, str]) -> str | None:
    if token := environ.get("HELIOSTAT_TOKEN"):
        return token.strip()
    file = environ.get("HELIOSTAT_TOKEN_FILE")
    return read_token(Path(file), "HELIOSTAT_TOKEN_FILE") if file else None


def _token_of_context(context: Context) -> str | None:
    return read_token(Path(context.token_file), "the context") if context.token_file else context.token


def read_token(file: Path, named_by: str) -> str:
    try:
        return file.read_text().strip()
    except OSError as error:
        raise InvalidRequest(
            f"the token file {file}, named by {named_by}, cannot be read: {error.strerror}",
            code="token_file_unreadable",
            hint="start the service with `heliostat up`, or name another file with --token-file",
        ) from error
