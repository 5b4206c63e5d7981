"""From a client's frame to a request that the engine can run, or to an error that names what is wrong with it.

Two halves: `read_frame` and `check` are cheap and run in the event loop, on any bytes; `prepare` renders the chat
template and tokenizes, in a thread. Sizes are capped before the work they would cause.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from typing import Any

import msgspec

from vibe_sgl_lite.runtime.errors import ContextLengthError, RequestError, TokenizerError
from vibe_sgl_lite.runtime.launcher.child import PipelineSpec
from vibe_sgl_lite.runtime.messages import ClientMessage, Generate
from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, resolve
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.text.grammar import grammar_source
from vibe_sgl_lite.tokenizer_manager.chat import text_format, thinking_rules
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import GrammarCompiler

BYTES_PER_TOKEN = 16  # text beyond this many bytes for each token of the context is not even tokenized
MIN_TEXT_BYTES = 64 * 1024
REQUEST_EXTRA_BYTES = 1024 * 1024  # of one frame, on top of its text: message keys, tools, sampling parameters
MAX_TEMPLATE_BYTES = 256 * 1024
MAX_MESSAGES = 4096
MAX_DEPTH = 32
MAX_RID_CHARS = 256
MAX_SALT_CHARS = 256
MAX_PRIORITY = 2**31 - 1
ROLES = ("system", "user", "assistant", "tool")
# Arguments of the template call that a request may not replace or that are not done here.
RESERVED = ("messages", "chat_template", "tokenize", "documents")

_FRAME_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)
_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)


class _GenerateHead(msgspec.Struct, array_like=True, tag="Generate"):
    rid: str


_head_decoder = msgspec.msgpack.Decoder(_GenerateHead)


class Limits(msgspec.Struct, frozen=True):
    """text_bytes: UTF-8 of one prompt. frame_bytes: one whole message."""

    text_bytes: int
    frame_bytes: int
    context_length: int

    @classmethod
    def of(cls, context_length: int) -> Limits:
        text_bytes = max(MIN_TEXT_BYTES, BYTES_PER_TOKEN * context_length)
        return cls(text_bytes, text_bytes + REQUEST_EXTRA_BYTES, context_length)


class Unreadable(msgspec.Struct, frozen=True):
    """A frame that is no message. `rid` where it is a request whose rid could be read: then it gets `error`."""

    error: RequestError
    rid: str | None = None


class Checked(msgspec.Struct, frozen=True):
    """A request as far as it can be checked without tokenizing; exactly one of prompt, input_ids, messages is set."""

    rid: str
    prompt: str | None
    input_ids: bytes | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams
    priority: int
    cache_salt: str
    template_kwargs: dict[str, Any]
    json_schema: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    max_thinking_tokens: int | None = None
    grammar: str | None = None

    @property
    def n(self) -> int:
        return self.params.n if isinstance(self.params.n, int) else 1


class Prepared(msgspec.Struct, frozen=True):
    """token_ids: int32 bytes. text_format: of a chat."""

    token_ids: bytes
    num_tokens: int
    sampling: ResolvedSampling
    text_format: TextFormat | None = None


def read_frame(frame: bytes, limits: Limits) -> ClientMessage | Unreadable:
    """Decode any bytes; never raises."""
    if len(frame) > limits.frame_bytes:
        error = ContextLengthError(
            f"the request has {len(frame)} bytes, with a context length of {limits.context_length} tokens at most "
            f"{limits.frame_bytes} are taken: send less text",
            field="prompt",
        )
        return Unreadable(error, _rid_of(frame))
    try:
        return _decoder.decode(frame)
    except _FRAME_ERRORS as error:
        return Unreadable(_frame_error(error), _rid_of(frame))


def check(message: Generate, limits: Limits, tokenizer: ChatTokenizer) -> Checked:
    """Everything about a request that is cheap to check. Raises RequestError naming the field."""
    if not 0 < len(message.rid) <= MAX_RID_CHARS:
        raise RequestError(f"rid has {len(message.rid)} characters: must have 1 to {MAX_RID_CHARS}", field="rid")
    if sum(part is not None for part in (message.prompt, message.input_ids, message.messages)) != 1:
        raise RequestError("give exactly one of prompt, input_ids and messages", field="prompt")
    if message.prompt is not None:
        _check_text(message.prompt, limits, "prompt")
    if message.messages is not None:
        _check_messages(message.messages)
    kwargs = message.template_kwargs or {}
    if kwargs:
        if message.messages is None:
            raise RequestError("template_kwargs go with messages only; leave them out", field="template_kwargs")
        _check_template_kwargs(kwargs, tokenizer)
    if message.max_thinking_tokens is not None:
        if message.messages is None:
            raise RequestError("max_thinking_tokens goes with messages only; leave it out", field="max_thinking_tokens")
        if not 0 <= message.max_thinking_tokens < 2**31:
            raise RequestError(
                f"max_thinking_tokens={message.max_thinking_tokens}: must be 0 or more", field="max_thinking_tokens"
            )
    salt = message.cache_salt or ""
    if len(salt) > MAX_SALT_CHARS:
        raise RequestError(f"cache_salt has {len(salt)} characters: at most {MAX_SALT_CHARS}", field="cache_salt")
    if not -MAX_PRIORITY <= message.priority <= MAX_PRIORITY:
        raise RequestError(
            f"priority={message.priority}: must be from -{MAX_PRIORITY} to {MAX_PRIORITY}", field="priority"
        )
    return Checked(
        message.rid,
        message.prompt,
        message.input_ids,
        message.messages,
        _read_sampling(message.sampling),
        message.priority,
        salt,
        kwargs,
        message.json_schema,
        message.regex,
        message.choice,
        message.max_thinking_tokens,
        message.grammar,
    )


def prepare(
    request: Checked, tokenizer: ChatTokenizer, grammars: GrammarCompiler, spec: PipelineSpec, limits: Limits
) -> Prepared:
    """Token ids and concrete sampling parameters; for a thread, it may take long. Raises RequestError."""
    chat = None
    if request.input_ids is not None:
        packed = request.input_ids
        num_tokens = _check_ids(packed, spec.model.vocab_size)
    else:
        if request.messages is not None:
            rendered = tokenizer.apply_chat_template(request.messages, **request.template_kwargs)
            _check_text(rendered, limits, "messages")
            chat = text_format(tokenizer.plain_text(rendered), request.template_kwargs, tokenizer)
            ids = tokenizer.encode_chat(rendered)
        else:
            assert request.prompt is not None
            ids = tokenizer.encode(request.prompt)
        assert max(ids, default=0) < spec.model.vocab_size, "the tokenizer has gaps, and ids beyond the model's"
        packed, num_tokens = array("i", ids).tobytes(), len(ids)
    if num_tokens == 0:
        raise RequestError("the prompt is empty: it must have at least one token", field="prompt")
    sampling = resolve(
        request.params,
        model_defaults=spec.model.generation_defaults.as_dict(),
        end_token_ids=spec.model.eos_token_ids,
        prompt_tokens=num_tokens,
        context_length=spec.context_length,
        vocab_size=spec.model.vocab_size,
    )
    source = grammar_source(request.json_schema, request.regex, request.choice, request.grammar)
    grammar = None
    if source is not None:
        _check_grammar_goes_with(sampling)
        grammar = grammars.compile(source)
    thinking = None
    if chat is not None:
        thinking = thinking_rules(
            chat, request.max_thinking_tokens, grammar is not None, request.template_kwargs, tokenizer
        )
    if grammar is not None or thinking is not None:
        sampling = msgspec.structs.replace(sampling, grammar=grammar, thinking=thinking)
    return Prepared(packed, num_tokens, sampling, chat)


def check_tokenizer(tokenizer: ChatTokenizer, spec: PipelineSpec) -> None:
    """Refuse a tokenizer of another model. Raises TokenizerError."""
    if tokenizer.vocab_size > spec.model.vocab_size:
        raise TokenizerError(
            f"{spec.tokenizer_folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model's vocab_size "
            f"is {spec.model.vocab_size}; pass the model's own tokenizer with --tokenizer-path"
        )


def _check_grammar_goes_with(sampling: ResolvedSampling) -> None:
    """A grammar decides where the output ends. Raises RequestError for what contradicts that."""
    for field, why in (
        ("ignore_eos", "the output ends where the grammar does"),
        ("min_new_tokens", "the grammar may end the output earlier"),
    ):
        if getattr(sampling, field):
            raise RequestError(f"{field} does not go with json_schema, regex, choice or grammar: {why}", field=field)
    if not sampling.end_token_ids:
        raise RequestError("json_schema, regex, choice and grammar need a model with an end token; this one names none")


def _rid_of(frame: bytes) -> str | None:
    try:
        return _head_decoder.decode(frame).rid
    except _FRAME_ERRORS:
        return None


def _frame_error(error: Exception) -> RequestError:
    """msgspec counts an array's elements, the tag first; clients know the fields by name."""
    found = re.search(r"\$\[(\d+)\]", str(error))
    fields = Generate.__struct_fields__
    if found is None or not 1 <= int(found[1]) <= len(fields):
        return RequestError(f"the request cannot be read: {error}")
    field = fields[int(found[1]) - 1]
    return RequestError(f"{field}: {error}", field=field)


def _read_sampling(raw: msgspec.Raw) -> SamplingParams:
    try:
        return msgspec.msgpack.decode(raw, type=SamplingParams)
    except _FRAME_ERRORS as error:
        if isinstance(error.__cause__, RequestError):
            raise error.__cause__ from error
        unknown = re.search(r"unknown field `(.*)`", str(error))
        if unknown is not None:
            known = ", ".join(SamplingParams.__struct_fields__)
            raise RequestError(f"{unknown[1]} is no sampling parameter; there are {known}", field=unknown[1]) from error
        path = re.search(r"\$\.(\w+)", str(error))
        field = path[1] if path is not None else "sampling"
        raise RequestError(f"{field}: {error}", field=field) from error


def _check_text(text: str, limits: Limits, field: str) -> None:
    size = len(text) if len(text) > limits.text_bytes else len(text.encode())
    if size > limits.text_bytes:
        raise ContextLengthError(
            f"{field} has {size} bytes of text, with a context length of {limits.context_length} tokens at most "
            f"{limits.text_bytes} are taken: shorten it",
            field=field,
        )


def _check_ids(packed: bytes, vocab_size: int) -> int:
    """Number of ids."""
    ids = array("i")
    if len(packed) % ids.itemsize:
        raise RequestError(f"input_ids has {len(packed)} bytes: must be int32 values, 4 bytes each", field="input_ids")
    ids.frombytes(packed)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        place = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"input_ids[{place}]={ids[place]} is outside the vocabulary, 0..{vocab_size - 1}", field="input_ids"
        )
    return len(ids)


def _check_messages(messages: list[dict[str, Any]]) -> None:
    """Shape of a chat; a tool-calling assistant turn without content gets an empty one, which templates expect."""
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages has {len(messages)} entries: must have 1 to {MAX_MESSAGES}", field="messages")
    _check_depth(messages, "messages")
    for place, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise RequestError(
                f"messages[{place}].role={role!r:.60}: must be one of {', '.join(ROLES)}", field="messages"
            )
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise RequestError(f"messages[{place}].tool_calls must be a list of objects", field="messages")
        if content is None and role == "assistant" and calls:
            message["content"] = ""
        elif isinstance(content, list):
            for number, part in enumerate(content):
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    raise RequestError(
                        f"messages[{place}].content[{number}] is no part of type text: only text is taken",
                        field="messages",
                    )
        elif not isinstance(content, str):
            raise RequestError(
                f"messages[{place}].content is a {type(content).__name__}: must be a text or a list of text parts",
                field="messages",
            )


def _check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: ChatTokenizer) -> None:
    _check_depth(kwargs, "template_kwargs")
    size = len(msgspec.msgpack.encode(kwargs))
    if size > MAX_TEMPLATE_BYTES:
        raise RequestError(f"template_kwargs has {size} bytes: at most {MAX_TEMPLATE_BYTES}", field="template_kwargs")
    known = tokenizer.template_variables()
    for name, value in kwargs.items():
        if name in RESERVED:
            raise RequestError(f"{name} cannot be passed to the chat template; leave it out", field=name)
        if name == "tools" and not _is_tools(value):
            raise RequestError("tools must be a list of objects", field="tools")
        if name not in known and value is not None and value is not False:  # what is off asks for nothing
            raise RequestError(f"{name} is not used by this model's chat template; leave it out", field=name)


def _is_tools(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value))


def _check_depth(value: Any, field: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RequestError(f"{field} is nested deeper than {MAX_DEPTH} levels: flatten it", field=field)
