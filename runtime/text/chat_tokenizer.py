"""The tokenizer of a model folder as transformers reads it, and its chats as token ids.

transformers reads the files (tokenizer.json or vocab.json with merges.txt, tokenizer_config.json, chat templates) and
renders the templates; it imports no torch for that. Added here: errors that name the field, which variables a template
reads, content given as parts, and that special tokens written in a message are text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from tokenizers import Tokenizer as Backend

from vibe_sgl_lite.runtime.errors import RequestError, TokenizerError
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Arguments of the template call beside what the template's own text reads.
_ARGUMENTS = frozenset({"tools", "add_generation_prompt", "continue_final_message"})
# Arguments of that call that a request may not replace or that are not done here.
RESERVED = ("messages", "chat_template", "tokenize", "documents", "allow_special_tokens")
PART_SEPARATOR = "\n"  # between text parts, for templates that read content as one text; vLLM joins them so too


class ChatTokenizer(Tokenizer):
    """A `Tokenizer` that knows the model's chat templates."""

    def __init__(self, loaded: PreTrainedTokenizerFast, *, source: str = "tokenizer") -> None:
        """Raises TokenizerError for a template that is no template."""
        super().__init__(loaded.backend_tokenizer, source=source)
        self._backend.encode_special_tokens = bool(loaded.split_special_tokens)
        self._loaded = loaded
        templates = loaded.chat_template or {}
        if not isinstance(templates, str | dict):
            raise TokenizerError(f"{source}: chat_template is a {type(templates).__name__}: must be text")
        self._templates: dict[str, str] = {"default": templates} if isinstance(templates, str) else dict(templates)
        self._variables = frozenset().union(*(_variables(text, source) for text in self._templates.values()))
        self._specials = [str(self.token(token_id)) for token_id in sorted(self.special_ids)]
        self._mark = str(10**19 + secrets.randbelow(9 * 10**19))  # digits: no filter and no JSON writer changes them
        self._marked = re.compile(self._mark + r"(\d{4})")
        self._plain: Backend | None = None
        self._takes_parts = self.has_chat_template and self._reads_parts()

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTokenizer:
        """Raises TokenizerError naming the folder and what is wrong with it."""
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        kind = PreTrainedTokenizerFast
        if not (folder / "tokenizer.json").is_file():
            if not ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()):
                raise TokenizerError(
                    f"{folder} has neither tokenizer.json nor vocab.json with merges.txt: --tokenizer-path must be a "
                    "folder with the model's tokenizer"
                )
            from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

            kind = Qwen2Tokenizer
        try:
            loaded = kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever a broken file makes the library raise
            text = " ".join(str(error).split())[:300]
            raise TokenizerError(
                f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {text}; download the files again"
            ) from error
        return cls(loaded, source=str(folder))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def template_mentions(self, text: str) -> bool:
        """Whether `text` stands in a chat template's source."""
        return any(text in template for template in self._templates.values())

    def template_variables(self) -> frozenset[str]:
        """Names that a request may pass to the template, over all its variants."""
        return self._variables | _ARGUMENTS

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        """Raises RequestError for what a request may not pass to the template, and for what no template here reads."""
        known = self.template_variables()
        for name, value in variables.items():
            if name in RESERVED:
                raise RequestError(f"{name} cannot be passed to the chat template; leave it out", field=name)
            if name not in known and value is not None and value is not False:  # what is off asks for nothing
                raise RequestError(f"{name} is not used by this model's chat template; leave it out", field=name)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, allow_special_tokens: bool = False, **variables: Any
    ) -> str:
        """The chat as text for `encode_chat`; `plain_text` gives what a person reads.

        variables: those of `template_variables`, such as `tools` and `enable_thinking`; `add_generation_prompt` is
        True unless the last message is continued. Special tokens in messages and variables are marked as text unless
        allowed. Raises RequestError with the template's own complaint.
        """
        if not self._templates:
            raise RequestError(
                f"{self._source} has no chat template; send a text prompt or token ids instead", field="messages"
            )
        mark = (lambda text: text) if allow_special_tokens else self._mark_specials
        given = {
            name: _map_texts(value, mark) for name, value in variables.items() if name in self.template_variables()
        }
        given.setdefault("add_generation_prompt", not given.get("continue_final_message"))
        chat = [_map_texts(self._with_content(message), mark) for message in messages]
        try:
            return str(self._loaded.apply_chat_template(chat, tokenize=False, **given))
        except Exception as error:  # a template can fail in any way on odd messages: that request's error
            reason = self.plain_text(str(error))[:500]
            raise RequestError(f"the chat template refused the messages: {reason}", field="messages") from error

    def fill(self, template: str, *texts: str) -> str:
        """`template` with each `{}` replaced, for `encode_chat`; special tokens in the texts are marked as text."""
        return template.format(*map(self._mark_specials, texts))

    def plain_text(self, rendered: str) -> str:
        """A chat from `apply_chat_template`, as it was written."""
        return self._marked.sub(lambda found: self._specials[int(found[1])], rendered)

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a chat from `apply_chat_template`. Raises RequestError for a lone surrogate."""
        if self._mark not in rendered:
            return self.encode(rendered, add_special_tokens=False)
        try:
            found = self._backend.encode_batch([rendered], add_special_tokens=False)[0]
        except TypeError as error:
            raise RequestError("the text holds a lone surrogate, which is not Unicode", field="messages") from error
        # Added tokens cut the text into stretches that are tokenized on their own; those with a mark, once more.
        added = self._backend.get_added_tokens_decoder()
        ids: list[int] = []
        stretch: list[int] = []
        begin = 0
        for token_id, (start, end) in [*zip(found.ids, found.offsets, strict=True), (-1, (len(rendered),) * 2)]:
            if token_id >= 0 and token_id not in added:
                stretch.append(token_id)
                continue
            text = rendered[begin:start]
            ids += self._encode_marked(text) if self._mark in text else stretch
            stretch, begin = [], end
            if token_id >= 0:
                ids.append(token_id)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        """`text` holds no added token but marks."""
        if self._plain is None:
            # The same vocabulary, in which special tokens are not looked for.
            plain = Backend(self._backend.model)
            plain.normalizer, plain.pre_tokenizer = self._backend.normalizer, self._backend.pre_tokenizer
            self._plain = plain
        return list(self._plain.encode(self.plain_text(text), add_special_tokens=False).ids)

    def _mark_specials(self, text: str) -> str:
        for number, special in enumerate(self._specials):
            if special in text:
                text = text.replace(special, f"{self._mark}{number:04d}")
        return text

    def _with_content(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Text parts become one text, or one part for a template that reads parts: no token can form between two."""
        parts = message.get("content")
        if not isinstance(parts, list):
            return message
        text = ("" if self._takes_parts else PART_SEPARATOR).join(str(part.get("text", "")) for part in parts)
        return {**message, "content": [{"type": "text", "text": text}] if self._takes_parts else text}

    def _reads_parts(self) -> bool:
        """Whether the template reads content given as a list of parts: both give the same, or a text alone is lost."""
        text = "PART"
        rendered = []
        contents: tuple[Any, ...] = (text, [{"type": "text", "text": text}])
        for content in contents:
            try:
                rendered.append(
                    self._loaded.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
                )
            except Exception:  # noqa: BLE001 - it does not read this one
                rendered.append("")
        as_text, as_parts = rendered
        return text in as_parts and (as_text == as_parts or text not in as_text)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks an assistant's text for training; here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _variables(template: str, source: str) -> frozenset[str]:
    """Names that a template reads. Raises TokenizerError where it cannot be parsed."""
    environment = jinja2.Environment(extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except (jinja2.TemplateSyntaxError, TypeError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TokenizerError(f"{source}: chat template{line}: {error}") from error
    return frozenset(names - environment.globals.keys() - {"raise_exception", "strftime_now"})


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every text in it changed, keys of objects too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_texts(key, change): _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(inner, change) for inner in value]
    return value
