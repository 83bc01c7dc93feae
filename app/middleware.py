"""Around every request: its id, the limit on the size of a body that is held in memory (all but uploads), and an end to
bodies that nobody will read."""

from __future__ import annotations

import re
import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import TooLarge

GIVEN_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")


class RequestContext:
    """Names the request (`x-request-id`, the caller's own if it has a plain form) and counts its body."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, uploads: frozenset[str], id_is_sent_outside: bool = False
    ) -> None:
        """`uploads`: paths that read their body as a stream, with a limit of their own. `id_is_sent_outside`: whoever wraps
        this application adds the id that came with the request to the answer; it must not stand there twice."""
        self._app = app
        self._max = max_body_bytes
        self._uploads = uploads
        self._sent_outside = id_is_sent_outside

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if GIVEN_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()
        scope["heliostat.request_id"] = request_id.decode()

        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers

        async def watched() -> Message:
            nonlocal unread
            message = await receive()
            unread = unread and message.get("more_body", False)
            return message

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [] if self._sent_outside and request_id == given else [(b"x-request-id", request_id)]
                if unread and message["status"] >= 400:  # else the client goes on sending, gigabytes perhaps
                    own.append((b"connection", b"close"))
                rest = [pair for pair in message["headers"] if pair[0].lower() != b"x-request-id"]
                message["headers"] = [*rest, *own]
            await send(message)

        streamed = scope["path"] in self._uploads
        await self._app(scope, watched if streamed else self._limited(watched), named)

    def _limited(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max:
                raise TooLarge(
                    f"the body has more than {self._max} bytes",
                    hint="Upload data as a dataset (POST /api/v1/datasets).",
                )
            return message

        return counted
