"""runtime.tokenizer equals transformers' AutoTokenizer: ids, text and chats; and refuses broken files by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from vibe_sgl_lite.runtime.errors import RequestError, TokenizerError
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

QWEN3 = os.environ.get("QWEN3_MODEL", "")
needs_qwen3 = pytest.mark.skipif(
    not (Path(QWEN3) / "tokenizer.json").is_file(), reason="needs QWEN3_MODEL, a folder with Qwen3's tokenizer.json"
)

TEXTS = [
    "The quick brown fox can't jump; it's 3.14 metres!\r\n\r\n\tx = [1,  2]",
    "机器学习模型可以理解和生成人类语言。你好,世界!",
    "日本語のひらがな、カタカナ、漢字",
    "한국어 텍스트를 처리합니다",
    "Привет, как дела? Ёжик",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया, क्षत्रिय",
    "สวัสดีชาวโลก",
    "Γειά σου Κόσμε",
    "ሰላም ልዑል",
    "தமிழ் மொழி",
    "👨‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone, 🇩🇪🇫🇷",
    "e\u0301 combining, Z\u0351\u036b\u0343algo, n\u0303",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n<tool_call>{}</tool_call><|endoftext|>",
    "",
    " ",
    "\n",
    "a" * 300,
    " " * 200,
    "\x00\x01\x7f\u200b\ufeff",
]


def small_backend() -> Backend:
    """A byte-level BPE of some 400 entries, trained here, with one special and one plain added token."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|end|>"],
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return backend


def write(folder: Path, config: dict[str, Any], template: str | None = None) -> Path:
    small_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_folder(QWEN3)


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN3)


@needs_qwen3
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encode_and_decode_equal_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@needs_qwen3
def test_special_ids_and_size_equal_transformers(ours: Tokenizer, theirs: Any) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.byte_level
    assert ours.token(151668) == "</think>"
    assert ours.token(151935) is None
    assert ours.token(-1) is None
    assert ours.decode([151935, 151700]) == ""


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Wetter für <Ort> & "mehr" — 天气',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}
CHATS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([{"role": "user", "content": "hi"}], {}),
    ([{"role": "user", "content": "hi"}], {"enable_thinking": False}),
    ([{"role": "user", "content": "hi"}], {"enable_thinking": True}),
    ([{"role": "user", "content": "hi"}], {"add_generation_prompt": False}),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好 👋"}], {}),
    (
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
            {"role": "user", "content": "and 2+2?", "name": None},
        ],
        {"enable_thinking": False},
    ),
    (
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": "", "reasoning_content": "call it", "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"t": 3}'},
            {"role": "tool", "content": "rain"},
        ],
        {"tools": TOOLS},
    ),
    (
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning": "older name"},
            {"role": "system", "content": "late system"},
        ],
        {"tools": TOOLS},
    ),
]


@needs_qwen3
@pytest.mark.parametrize(("messages", "variables"), CHATS, ids=range(len(CHATS)))
def test_chat_template_equals_transformers(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> None:
    text = ours.apply_chat_template(messages, **variables)
    keywords = {"add_generation_prompt": True, **variables}
    assert text == theirs.apply_chat_template(messages, tokenize=False, **keywords)
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, **keywords)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids


@needs_qwen3
def test_template_variables(ours: Tokenizer) -> None:
    assert {"messages", "tools", "enable_thinking", "add_generation_prompt"} <= ours.template_variables()
    assert "namespace" not in ours.template_variables()


SMALL_CONFIGS: list[dict[str, Any]] = [
    {},
    {"eos_token": "<|end|>", "pad_token": {"__type": "AddedToken", "content": "<|pad|>", "lstrip": False}},
    {"bos_token": "<|begin|>", "add_bos_token": True, "eos_token": "<|end|>", "add_eos_token": True},
    {"additional_special_tokens": ["<think>"], "eos_token": "<|end|>"},
    {"eos_token": "<|end|>", "split_special_tokens": True},
    {
        "added_tokens_decoder": {
            "401": {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}
        }
    },
]


@pytest.mark.parametrize("config", SMALL_CONFIGS, ids=range(len(SMALL_CONFIGS)))
def test_added_tokens_equal_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write(tmp_path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*TEXTS, "x<|end|>y <|pad|> <|late|>  z<think> <|begin|>"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ bos_token }}{{ m.content }}\n  {% endif %}\n{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "{{ {'b': 1, 'a': ['<é>']} | tojson(indent=1, sort_keys=True) }}{{ dict(x=1) | tojson }}",
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_template_dialect_equals_transformers(tmp_path: Path, template: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write(
        tmp_path,
        {"bos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "no"},
        template,
    )
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    messages = [{"role": "user", "content": "<q> \u00e9"}, {"role": "user", "content": "r"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages, tokenize=False)


def test_named_templates(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools[0] }}"}]
    ours = Tokenizer.from_folder(write(tmp_path, {"chat_template": templates}))
    assert ours.apply_chat_template([]) == "plain"
    assert ours.apply_chat_template([], tools=["x"]) == "tools x"


def test_template_complaints_are_the_requests_error(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(write(tmp_path, {}, "{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(RequestError, match="roles must alternate"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ ''.__class__.__bases__[0] }}"]
)
def test_template_sandbox(tmp_path: Path, template: str) -> None:
    ours = Tokenizer.from_folder(write(tmp_path, {}, template))
    with pytest.raises(RequestError, match="unsafe"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


def test_no_template(tmp_path: Path) -> None:
    ours = Tokenizer.from_folder(write(tmp_path, {}))
    assert not ours.has_chat_template
    with pytest.raises(RequestError, match="has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        Tokenizer(small_backend()).encode("a\ud800")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    write(tmp_path, {}, "{% if %}")
    with pytest.raises(TokenizerError, match="chat template, line 1"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for content, problem in (("[1]", "must hold a JSON object"), ("{", "cannot be read as JSON")):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json {problem}"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)
    for added, problem in ((["x"], "malformed"), ({"9999": {"content": "<new>"}}, "use files of one model")):
        write(tmp_path, {"added_tokens_decoder": added})
        with pytest.raises(TokenizerError, match=problem):
            Tokenizer.from_folder(tmp_path)
    write(tmp_path, {"chat_template": 3})
    with pytest.raises(TokenizerError, match="chat_template must be"):
        Tokenizer.from_folder(tmp_path)


def test_loads_without_torch_and_transformers(tmp_path: Path) -> None:
    folder = write(tmp_path, {}, "x")
    code = (
        "import sys; from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer; "
        f"Tokenizer.from_folder({str(folder)!r}).encode('x'); "
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
