"""Whether the engine is told that somebody reads tokens as they come; no engine."""

from __future__ import annotations

from typing import Any

import pytest

from vibe_sgl_lite.http_server import anthropic_messages, openai_chat, openai_responses
from vibe_sgl_lite.http_server.openai_types import ChatBody

QUESTION: Any = [{"role": "user", "content": "x"}]
STREAM = pytest.mark.parametrize(("stream", "told"), [(None, False), (False, False), (True, True)])


@STREAM
def test_chats(stream: bool | None, told: bool) -> None:
    request = openai_chat.chat_request(ChatBody(messages=QUESTION, stream=stream))
    assert request.engine.message.streamed is told


@STREAM
def test_messages(stream: bool | None, told: bool) -> None:
    body = anthropic_messages.MessagesBody(messages=QUESTION, max_tokens=9, stream=stream)
    assert anthropic_messages._request(body).message.streamed is told


@STREAM
def test_responses(stream: bool | None, told: bool) -> None:
    body = openai_responses.ResponsesBody(input="x", stream=stream)
    assert openai_responses._request(body).message.streamed is told
