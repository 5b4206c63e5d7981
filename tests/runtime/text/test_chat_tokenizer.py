"""The tokenizer equals transformers' AutoTokenizer; what it adds to it; broken files are refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.text.harness import QWEN3, TEXTS, needs_qwen3, small_backend, split, write
from vibe_sgl_lite.runtime.errors import RequestError, TokenizerError
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


@needs_qwen3
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_encode_and_decode_equal_transformers(ours: ChatTokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@needs_qwen3
def test_special_ids_and_size_equal_transformers(ours: ChatTokenizer, theirs: Any) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.byte_level
    assert ours.token(151668) == "</think>"
    assert ours.token(151935) is None
    assert ours.token(-1) is None
    assert ours.decode([151935, 151700]) == ""


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
    ours, theirs = ChatTokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in [*TEXTS, "x<|end|>y <|pad|> <|late|>  z<think> <|begin|>"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_a_begin_token_that_the_config_asks_for(tmp_path: Path) -> None:
    """Without tokenizer.json its post-processor is made from the config; chats get none on top of the template's."""
    from transformers import AutoTokenizer

    config = {"bos_token": "<|end|>", "add_bos_token": True, "tokenizer_class": "Qwen2Tokenizer"}
    folder = split(write(tmp_path, config, "{{ messages[0].content }}"))
    ours, theirs = ChatTokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    (begin,) = ours.encode("<|end|>", add_special_tokens=False)
    assert ours.encode("hi") == theirs("hi")["input_ids"] == [begin, *ours.encode("hi", add_special_tokens=False)]
    assert ours.encode_chat(ours.apply_chat_template(HI)) == ours.encode("hi", add_special_tokens=False)


@needs_qwen3
def test_a_folder_without_tokenizer_json(ours: ChatTokenizer, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(QWEN3) / name).read_bytes())
    older = ChatTokenizer.from_folder(split(tmp_path))
    written = tmp_path / "run.json"
    older.write_json(written)
    reread = Tokenizer.from_file(written)
    assert not list(tmp_path.glob("*.part"))
    assert (reread.vocab_size, reread.special_ids) == (ours.vocab_size, ours.special_ids)
    for text in TEXTS:
        ids = ours.encode(text)
        assert older.encode(text) == reread.encode(text) == ids
        assert reread.decode(ids) == ours.decode(ids)


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(RequestError, match="surrogate"):
        Tokenizer(small_backend()).encode("a\ud800")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has neither tokenizer\.json nor vocab\.json"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match=rf"{tmp_path}: its tokenizer cannot be read"):
        ChatTokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    write(tmp_path, {}, "{% if %}")
    with pytest.raises(TokenizerError, match="chat template, line 1"):
        ChatTokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for content in (b"[1]", b"{", b"\xff\xfe", b'{"added_tokens_decoder": ["x"]}', b'{"chat_template": 3}'):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(TokenizerError, match=str(tmp_path)) as caught:
            ChatTokenizer.from_folder(tmp_path)
        assert "\n" not in str(caught.value)
    write(tmp_path, {})
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"decoder": None}))
    for load in (ChatTokenizer.from_folder, lambda folder: Tokenizer.from_file(folder / "tokenizer.json")):
        with pytest.raises(TokenizerError, match="has no decoder"):
            load(tmp_path)


def test_loads_without_torch(tmp_path: Path) -> None:
    """The tokenizer manager needs transformers but not torch, the detokenizer neither."""
    folder = write(tmp_path, {}, "{{ messages[0].content }}")
    for code, absent in (
        (
            "from vibe_sgl_lite.tokenizer_manager import process; "
            "from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer; "
            f"t = ChatTokenizer.from_folder({str(folder)!r}); "
            "t.encode_chat(t.apply_chat_template([{'role': 'user', 'content': 'x'}]))",
            "{'torch'}",
        ),
        (
            "from vibe_sgl_lite.detokenizer import process; "
            "from vibe_sgl_lite.runtime.text.tokenizer import Tokenizer; "
            f"Tokenizer.from_file({str(folder / 'tokenizer.json')!r}).decode([1])",
            "{'torch', 'transformers', 'numpy', 'jinja2'}",
        ),
    ):
        code = f"import sys; {code}; assert not {absent} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
