"""Errors as HTTP clients know them: a status, and a JSON body in the form of the API that was called."""

from __future__ import annotations

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
# Where an error of the engine names one of its own fields: what HTTP clients call that.
ENGINE_FIELDS: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "include_stop": "include_stop_str_in_output",
    "template_kwargs": "chat_template_kwargs",
    "json_schema": "response_format",
    "choice": "structured_outputs",
    "grammar": "structured_outputs",
    "prompt_logprobs": "logprobs",
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
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code or "invalid_value")


def from_engine(error: VibeError, fields: Mapping[str, str] = ENGINE_FIELDS) -> ApiError:
    """fields: names of the request's fields, by the engine's names for them."""
    text = str(error)
    match error:
        case RequestError(field=field):
            param = None if field is None else fields.get(field, field)
            code = error.code if isinstance(error, ContextLengthError) else "invalid_value"
            return ApiError(400, text, param=param, code=code)
        case KVExhaustedError():
            return ApiError(400, text, code=ContextLengthError.code)
        case DrainingError() | ConnectError():
            return ApiError(503, text, code=error.code)
        case OverloadedError():
            return ApiError(429, text, code=error.code)
    return ApiError(503 if error.code in ("aborted", "closed") else 500, text, code=error.code)
