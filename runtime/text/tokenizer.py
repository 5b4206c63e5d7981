"""Tokenizer and chat template of a model folder, without transformers and without torch.

Built on the tokenizers library: loading Qwen3's 11 MB tokenizer.json takes 0.3 s so, 0.9 s through transformers'
`PreTrainedTokenizerFast`. What transformers adds from tokenizer_config.json (more special tokens, the chat template
and the sandbox it runs in) is applied here the same way; tests compare with `AutoTokenizer`.
Knows nothing of requests, streams or sockets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as Backend

from vibe_sgl_lite.runtime.errors import RequestError, TokenizerError

NAMED_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # a message's reasoning goes by any of these


class Tokenizer:
    """Text to token ids and back, and chats to text. Safe to use from several threads once built.

    vocab_size: one more than the highest id that has a token, if the model's own vocabulary has no gaps (a look
    through all of it would take 0.1 s). special_ids: ids that `skip_special_tokens` leaves out.
    byte_level: ids stand for bytes of UTF-8 (GPT-2's alphabet), as in every Qwen3 checkpoint.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any] | None = None, *, source: str = "tokenizer") -> None:
        """`config` is tokenizer_config.json's content, its chat template included; `source` names it in errors.

        Raises TokenizerError.
        """
        self._backend = backend
        self._source = source
        config = config or {}
        self._named = _named_special_tokens(config)
        self._templates = _templates(config, source)
        _complete_added_tokens(backend, config, self._named, source)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added), 0)
        self.special_ids: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self.byte_level: bool = isinstance(backend.decoder, decoders.ByteLevel)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.json, and if they are there tokenizer_config.json and chat_template.jinja.

        Raises TokenizerError naming the file.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} does not exist: --tokenizer-path must be a folder with tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {error}; download the file again") from error
        config_path = folder / "tokenizer_config.json"
        config = _read_object(config_path) if config_path.is_file() else {}
        template_path = folder / "chat_template.jinja"
        if template_path.is_file():
            config["chat_template"] = _read_text(template_path)
        return cls(backend, config, source=str(folder))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds the begin and end tokens that the model asks for, if any.

        Raises RequestError for text that is not Unicode (a lone surrogate).
        """
        try:
            # The batch call lets other threads run meanwhile; `encode` holds the interpreter lock throughout.
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except TypeError as error:
            raise RequestError("the text holds a lone surrogate, which is not Unicode", field="prompt") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids` in one go; bytes that form no character become U+FFFD, ids without a token nothing."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The vocabulary's entry, in the tokenizer's own alphabet; None for an id that has no token."""
        if not 0 <= token_id < 2**31:
            return None
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry in the tokenizer's own alphabet, such as an added token; None for no entry."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def template_mentions(self, text: str) -> bool:
        """Whether `text` stands in the chat template's source."""
        return any(text in template.source for template in self._templates.values())

    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads, over all its variants; functions that it is given are not among them."""
        return frozenset().union(*(template.variables for template in self._templates.values()))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The chat as text, ready for `encode(..., add_special_tokens=False)`.

        variables: what the template reads besides the messages (`tools`, `enable_thinking`). Keys of messages whose
        value is None are dropped first, as transformers does. Raises RequestError with the template's own complaint.
        """
        tools = variables.pop("tools", None)
        template = (self._templates.get("tool_use") if tools is not None else None) or self._templates.get("default")
        if template is None:
            raise RequestError(
                f"{self._source} has no chat template; send a text prompt or token ids instead", field="messages"
            )
        values: dict[str, Any] = {**self._named, "documents": None, **variables}
        values |= {"messages": [_normal(message) for message in messages], "tools": tools}
        return template.render(add_generation_prompt=add_generation_prompt, **values)


class _ChatTemplate:
    """One compiled template in a sandbox that can neither change its inputs nor reach Python's internals."""

    def __init__(self, text: str, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self.source = text
            self._template = environment.from_string(text)
            names = jinja2.meta.find_undeclared_variables(environment.parse(text))
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"{source}: chat template, line {error.lineno}: {error.message}") from error
        self.variables = frozenset(names - environment.globals.keys())

    def render(self, **values: Any) -> str:
        try:
            return self._template.render(**values)
        except Exception as error:  # a template can fail in any way on odd messages: that request's error
            raise RequestError(f"the chat template refused the messages: {error}", field="messages") from error


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters, which models have never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _normal(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without its None values, its reasoning under the name that templates read."""
    normal = {key: value for key, value in message.items() if value is not None}
    reasoning = next((normal[key] for key in _REASONING_KEYS if key in normal), None)
    return normal if reasoning is None else {"thinking": reasoning, **normal, "reasoning_content": reasoning}


def _templates(config: Mapping[str, Any], source: str) -> dict[str, _ChatTemplate]:
    """Templates by name: one is "default"; a list may hold others, of which "tool_use" is for requests with tools."""
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": _ChatTemplate(value, source)}
    if isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= entry.keys() for entry in value
    ):
        return {str(entry["name"]): _ChatTemplate(str(entry["template"]), source) for entry in value}
    raise TokenizerError(f"{source}: chat_template must be text or a list of objects with name and template")


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: config.get(key) for key in NAMED_SPECIAL}
    return {key: _content(value) for key, value in named.items() if value is not None}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _complete_added_tokens(backend: Backend, config: Mapping[str, Any], named: Mapping[str, str], source: str) -> None:
    """Add what only tokenizer_config.json lists; where both files know a token, tokenizer.json decides."""
    known = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    try:
        for token_id, entry in sorted((int(key), value) for key, value in listed.items()):
            if entry["content"] in known:
                continue
            backend.add_tokens([AddedToken(**{key: entry[key] for key in _ADDED_FIELDS if key in entry})])
            if backend.token_to_id(entry["content"]) != token_id:
                raise TokenizerError(
                    f"{source}/tokenizer_config.json: added_tokens_decoder[{token_id}]={entry['content']!r} gets id "
                    f"{backend.token_to_id(entry['content'])} from tokenizer.json; use files of one model"
                )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{source}/tokenizer_config.json: added_tokens_decoder is malformed: {error!r}") from error
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    known = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [content for content in dict.fromkeys([*named.values(), *map(_content, extra)]) if content not in known]
    )


_ADDED_FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path} cannot be read as JSON: {error}; download the file again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
