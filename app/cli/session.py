"""What one command works with: where to write, and the service it talks to, connected when first needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType

from app.cli.client import Client
from app.cli.contexts import Connection, Given, load_contexts, resolve
from app.cli.output import Output


class Session:
    def __init__(self, given: Given, environ: Mapping[str, str] | None = None) -> None:
        self.given = given
        self.environ = os.environ if environ is None else environ
        self.out = Output(as_json=given.json)
        self._stack = ExitStack()
        self._clients: dict[tuple[bool, bool], Client] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def connection(self, *, operator: bool = False) -> Connection:
        return resolve(self.given, self.environ, load_contexts(), operator=operator)

    def client(self, *, operator: bool = False, acting: bool = True) -> Client:
        """`operator`: the command needs an operator's token (see `contexts.resolve`). `acting` False: --tenant is what the
        command is about, which may not exist yet, not whom it acts for."""
        if (operator, acting) not in self._clients:
            connection = self.connection(operator=operator)
            client = Client(connection if acting else replace(connection, tenant=None), notify=self.out.note)
            self._stack.callback(client.close)
            self._clients[operator, acting] = client
        return self._clients[operator, acting]
