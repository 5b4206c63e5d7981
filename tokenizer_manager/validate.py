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
from vibe_sgl_lite.runtime.messages import ClientMessage, Generate, check_fields, decode_extension, encode_values
from vibe_sgl_lite.runtime.messages.parts import TextFormat
from vibe_sgl_lite.runtime.settings.sampling_params import ResolvedSampling, SamplingParams, resolve
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.text.grammar import grammar_source
from vibe_sgl_lite.tokenizer_manager.chat import text_format, thinking_rules
from vibe_sgl_lite.tokenizer_manager.frames import MAX_VALUES, has_few_values, short_rid
from vibe_sgl_lite.tokenizer_manager.grammar_compiler import GrammarCompiler
from vibe_sgl_lite.tokenizer_manager.pooling import PAIR, check_pooling, is_pooled, resolve_pooling

BYTES_PER_TOKEN = 16  # text beyond this many bytes for each token of the context is not even tokenized
MIN_TEXT_BYTES = 64 * 1024
REQUEST_EXTRA_BYTES = 1024 * 1024  # of one frame, on top of its text: message keys, tools, sampling parameters
MAX_TEMPLATE_BYTES = 256 * 1024
MAX_MESSAGES = 4096
MAX_DEPTH = 32
MAX_ECHO_CHARS = 256  # of what a client sent
ROLES = ("system", "user", "assistant", "tool")

_FRAME_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)
_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage, ext_hook=decode_extension)


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
        return Unreadable(error, short_rid(frame, MAX_ECHO_CHARS))
    if not has_few_values(frame):
        text = f"the request is cut short, or holds more than {MAX_VALUES} values: send less at once"
        return Unreadable(RequestError(text), short_rid(frame, MAX_ECHO_CHARS))
    try:
        return _decoder.decode(frame)
    except _FRAME_ERRORS as error:
        return Unreadable(_frame_error(error), short_rid(frame, MAX_ECHO_CHARS))


def check(message: Generate, limits: Limits, tokenizer: ChatTokenizer) -> SamplingParams:
    """Everything about a request that is cheap to check. Returns its sampling parameters.

    Raises RequestError naming the field.
    """
    check_fields(message)
    given = (message.prompt, message.input_ids, message.messages, message.pair)
    if sum(part is not None for part in given) != 1:
        raise RequestError("give exactly one of prompt, input_ids and messages", field="prompt")
    for text in message.pair or ():
        _check_text(text, limits, "prompt")
    if message.prompt is not None:
        _check_text(message.prompt, limits, "prompt")
    if message.messages is not None:
        _check_messages(message.messages)
    else:
        for field in ("template_kwargs", "max_thinking_tokens"):
            if getattr(message, field) not in (None, {}):
                raise RequestError(f"{field} goes with messages only; leave it out", field=field)
    if message.template_kwargs:
        _check_template_kwargs(message.template_kwargs, tokenizer)
    params = _read_sampling(message.sampling)
    return check_pooling(message, params) if is_pooled(message) else params


def prepare(
    request: Generate,
    params: SamplingParams,
    tokenizer: ChatTokenizer,
    grammars: GrammarCompiler,
    spec: PipelineSpec,
    limits: Limits,
    pool_tokens: int | None = None,
) -> Prepared:
    """Token ids and concrete sampling parameters; for a thread, it may take long. Raises RequestError.

    params: what `check` returned. pool_tokens: of the whole KV pool, where it is known.
    """
    kwargs = request.template_kwargs or {}
    chat = None
    if request.input_ids is not None:
        packed = request.input_ids
        num_tokens = len(_check_ids(packed, spec.model.vocab_size, "input_ids"))
    else:
        if request.messages is not None:
            allowed = params.allow_special_tokens is True
            rendered = tokenizer.apply_chat_template(request.messages, allow_special_tokens=allowed, **kwargs)
            _check_text(rendered, limits, "messages")
            chat = text_format(tokenizer.plain_text(rendered), kwargs, tokenizer)
            ids = tokenizer.encode_chat(rendered)
        elif request.pair is not None:
            ids = tokenizer.encode_chat(tokenizer.fill(PAIR, *request.pair))
        else:
            assert request.prompt is not None
            ids = tokenizer.encode(request.prompt)
        assert max(ids, default=0) < spec.model.vocab_size, "the tokenizer has gaps, and ids beyond the model's"
        packed, num_tokens = array("i", ids).tobytes(), len(ids)
    if num_tokens == 0:
        raise RequestError("the prompt is empty: it must have at least one token", field="prompt")
    if is_pooled(request):
        return Prepared(packed, num_tokens, resolve_pooling(request, params, num_tokens, tokenizer, spec))
    if not spec.model.has_head:
        raise RequestError(f"{spec.model_name} has no lm_head: it makes embeddings and no text", field="prompt")
    sampling = resolve(
        params,
        model_defaults=spec.model.generation_defaults.as_dict(),
        end_token_ids=spec.model.eos_token_ids,
        prompt_tokens=num_tokens,
        context_length=spec.context_length,
        vocab_size=spec.model.vocab_size,
        pool_tokens=pool_tokens,
    )
    source = grammar_source(request.json_schema, request.regex, request.choice, request.grammar)
    grammar = None
    if source is not None:
        _check_grammar_goes_with(sampling)
        grammar = grammars.compile(source)
    thinking = None
    if chat is not None:
        thinking = thinking_rules(chat, request.max_thinking_tokens, grammar is not None, kwargs, tokenizer)
    if grammar is not None or thinking is not None:
        sampling = msgspec.structs.replace(sampling, grammar=grammar, thinking=thinking)
    if request.resume_ids is not None:
        _check_resume(request.resume_ids, params, sampling, spec.model.vocab_size)
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
        values = msgspec.msgpack.decode(raw)
    except _FRAME_ERRORS as error:
        raise RequestError(f"sampling: {error}", field="sampling") from error
    if not (isinstance(values, dict) and all(isinstance(name, str) for name in values)):
        raise RequestError("sampling: must be a map of sampling parameters by name", field="sampling")
    return SamplingParams(**values)


def _check_text(text: str, limits: Limits, field: str) -> None:
    size = len(text) if len(text) > limits.text_bytes else len(text.encode())
    if size > limits.text_bytes:
        raise ContextLengthError(
            f"{field} has {size} bytes of text, with a context length of {limits.context_length} tokens at most "
            f"{limits.text_bytes} are taken: shorten it",
            field=field,
        )


def _check_ids(packed: bytes, vocab_size: int, field: str) -> array[int]:
    ids = array("i")
    if len(packed) % ids.itemsize:
        raise RequestError(f"{field} has {len(packed)} bytes: must be int32 values, 4 bytes each", field=field)
    ids.frombytes(packed)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        place = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        raise RequestError(f"{field}[{place}]={ids[place]} is outside the vocabulary, 0..{vocab_size - 1}", field=field)
    return ids


def _check_resume(
    resume_ids: list[bytes | None], params: SamplingParams, sampling: ResolvedSampling, vocab_size: int
) -> None:
    """What a client has of its samples must be what could have come. Raises RequestError."""
    field = "resume_ids"
    if not isinstance(params.seed, int):
        raise RequestError(f"{field} go with the seed that the request ran with: give it", field=field)
    if len(resume_ids) != sampling.n or all(ids is None for ids in resume_ids):
        raise RequestError(f"{field} must have {sampling.n} entries, one a sample, one of them not None", field=field)
    ends = {*sampling.end_token_ids, *sampling.stop_token_ids}
    for ids in (_check_ids(packed, vocab_size, field) for packed in resume_ids if packed is not None):
        if len(ids) >= sampling.max_new_tokens:
            raise RequestError(
                f"{field} has {len(ids)} tokens, max_new_tokens={sampling.max_new_tokens}: nothing is left to generate",
                field=field,
            )
        if not ends.isdisjoint(ids):
            raise RequestError(f"{field} has a token that ends the output: such a sample is None", field=field)


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
    try:
        size = len(encode_values(kwargs))
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"template_kwargs cannot be read: {error}", field="template_kwargs") from error
    if size > MAX_TEMPLATE_BYTES:
        raise RequestError(f"template_kwargs has {size} bytes: at most {MAX_TEMPLATE_BYTES}", field="template_kwargs")
    tokenizer.check_variables(kwargs)
    if not _is_tools(kwargs.get("tools")):
        raise RequestError("tools must be a list of objects", field="tools")


def _is_tools(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(tool, dict) for tool in value))


def _check_depth(value: Any, field: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(key, tuple | bytes) for outer in level if isinstance(outer, dict) for key in outer):
            raise RequestError(f"{field} has a list or bytes as a key: only texts and numbers can be keys", field=field)
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise RequestError(f"{field} is nested deeper than {MAX_DEPTH} levels: flatten it", field=field)
