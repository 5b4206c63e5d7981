"""Errors as HTTP clients know them: a status, and a JSON body in the form of the API that was called."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vibe_sgl_lite.runtime.errors import (
    ConnectError,
    ContextLengthError,
    DrainingError,
    KVExhaustedError,
    OverloadedError,
    RequestError,
    VibeError,
)

RETRY_AFTER_S = 1
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Where an error of the engine names one of its own fields: what clients of each API call that.
_COMMON = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "include_stop": "include_stop_str_in_output",
    "template_kwargs": "chat_template_kwargs",
    "max_thinking_tokens": "thinking_token_budget",
    "json_schema": "response_format",
    "choice": "structured_outputs",
    "grammar": "structured_outputs",
    "prompt_logprobs": "logprobs",
}
_FIELDS: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": _COMMON | {"prompt": "messages"},
    "/v1/completions": _COMMON | {"top_logprobs": "logprobs"},
    "/v1/embeddings": {"prompt": "input", "input_ids": "input"},
    "/v1/rerank": {"prompt": "documents", "pair": "documents"},
    "/v1/score": {"prompt": "text_2", "pair": "text_2", "documents": "text_2", "query": "text_1"},
    "/v1/responses": {
        "max_new_tokens": "max_output_tokens",
        "messages": "input",
        "prompt": "input",
        "json_schema": "text",
        "grammar": "tool_choice",
    },
    "/v1/messages": {
        "max_new_tokens": "max_tokens",
        "max_thinking_tokens": "thinking",
        "prompt": "messages",
        "stop": "stop_sequences",
        "json_schema": "output_config",
        "grammar": "tool_choice",
    },
}


class ApiError(Exception):
    """What a client is told. param: the field of the request that is wrong. code: for programs to react to."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def type(self) -> str:
        return TYPES.get(self.status, "server_error")

    def openai(self) -> dict[str, object]:
        """OpenAI's body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, object]:
        """Anthropic's body, and its `error` event."""
        kind = "api_error" if self.type == "server_error" else self.type
        text = _as_anthropic_says(self.message) if self.code == ContextLengthError.code else self.message
        return {"type": "error", "error": {"type": kind, "message": text}}


def _as_anthropic_says(message: str) -> str:
    """What does not fit the context, in that API's words, which are all that its clients, coding agents, know it by:
    they compact what they send, or ask for fewer tokens. There is no code in these errors."""
    if found := re.search(r"=(\d+) with a prompt of (\d+) tokens passes the context length of (\d+)", message):
        asked, prompt, limit = found.groups()
        return f"input length and `max_tokens` exceed context limit: {prompt} + {asked} > {limit}; {message}"
    if found := re.search(r"has (\d+) tokens, context length is (\d+)", message):
        return f"prompt is too long: {found[1]} tokens > {found[2]} maximum; {message}"
    return f"prompt is too long: {message}"


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code or "invalid_value")


def from_engine(error: VibeError, path: str = "") -> ApiError:
    """path: of the API that was called; its clients' names stand for the engine's."""
    text, fields = str(error), _FIELDS.get(path, {})
    match error:
        case RequestError(field=field):
            param = None if field is None else fields.get(field, field)
            if field is not None and param is not None:
                text = text.replace(field, param)
            code = error.code if isinstance(error, ContextLengthError) else "invalid_value"
            return ApiError(400, text, param=param, code=code)
        case KVExhaustedError():
            return ApiError(400, text, code=ContextLengthError.code)
        case DrainingError() | ConnectError():
            return ApiError(503, text, code=error.code)
        case OverloadedError():
            return ApiError(429, text, code=error.code)
    return ApiError(503 if error.code in ("aborted", "closed") else 500, text, code=error.code)
