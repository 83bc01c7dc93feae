"""Server-sent events over what a service yields; a comment every 15 s keeps the connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import Header, Request
from sse_starlette import EventSourceResponse, ServerSentEvent

from app.schemas.common import Text
from app.services.events import Message

HEARTBEAT_S = 15
LastEventId = Annotated[Text | None, Header(alias="Last-Event-ID", description="Go on after this event.")]
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def wants_stream(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


def stream(messages: AsyncIterator[Message]) -> EventSourceResponse:
    return EventSourceResponse(_encoded(messages), ping=HEARTBEAT_S)


async def _encoded(messages: AsyncIterator[Message]) -> AsyncIterator[ServerSentEvent]:
    async for message in messages:
        yield ServerSentEvent(orjson.dumps(message.data).decode(), event=message.event, id=message.id)
