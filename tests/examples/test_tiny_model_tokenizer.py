"""The tiny tokenizer: bytes in, the same bytes out; a token a digit; chats rendered exactly as Qwen3 renders them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.tiny_model.template import TEMPLATE_FILE, render_chat, tools_as_system_message
from examples.tiny_model.tokenizer import MARKUP, SPECIAL, VOCAB_SIZE, save_tokenizer, train_tokenizer
from examples.tiny_model.tools import TOOL_BOX
from tests.examples.tiny_model_paths import DENSE, MOE

TOKENIZER = Tokenizer.from_file(str(DENSE / "tokenizer.json"))


def load(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@given(st.text())
def test_any_text_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    if not any(mark in text for mark in SPECIAL):
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["你好，世界", "👨‍👩‍👧 👍🏽 🇫🇷", "e\u0301 é", "नमस्ते", "\x00\x7f\u0080\U0010ffff", " \n\n\t  x "]
)
def test_hard_scripts_come_back_unchanged(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(st.integers(min_value=0), st.integers())
def test_a_number_has_one_token_a_digit(left: int, right: int) -> None:
    tokens = TOKENIZER.encode(f"{left} + {right}=").tokens
    digits = [token for token in tokens if any(character.isdigit() for character in token)]
    assert digits == list(f"{left}{abs(right)}")


def test_vocabulary_holds_all_bytes_and_divides_by_8() -> None:
    vocabulary = TOKENIZER.get_vocab(with_added_tokens=True)
    assert len(vocabulary) == VOCAB_SIZE
    assert VOCAB_SIZE % 8 == 0
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(vocabulary)
    assert sorted(vocabulary.values()) == list(range(VOCAB_SIZE))


def test_special_tokens_are_skipped_and_markup_stays() -> None:
    text = "<|im_start|><think>x</think><tool_call></tool_call><tool_response></tool_response><|im_end|><|endoftext|>"
    ids = TOKENIZER.encode(text).ids
    assert len(ids) == len(SPECIAL) + len(MARKUP) + 1
    assert TOKENIZER.decode(ids) == "<think>x</think><tool_call></tool_call><tool_response></tool_response>"
    tokenizer = load(DENSE)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token is None
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)


def test_both_checkpoints_carry_the_same_tokenizer_and_the_template_file() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (DENSE / name).read_bytes() == (MOE / name).read_bytes()
    config = json.loads((DENSE / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == TEMPLATE_FILE.read_text(encoding="utf-8")


def test_training_a_tokenizer_is_deterministic(tmp_path: Path) -> None:
    first, again = (train_tokenizer(seed=1, documents=3_000) for _ in range(2))
    assert first.to_str() == again.to_str()
    save_tokenizer(first, tmp_path)
    assert load(tmp_path).encode("17") == [first.token_to_id("1"), first.token_to_id("7")]


# The chat template --------------------------------------------------------------------------------------------------


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo", "deep": [1, {"é": None}]}},
}
FLAT_CALL = {"name": "get_time", "arguments": '{"city": "Oslo"}'}
USER, SYSTEM = message("user", "hi"), message("system", "Be kind.")

CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM],
    [USER, message("assistant", "Hello!"), message("user", "  \nbye\n ")],
    [USER, message("assistant", "<think>\nHm.\n</think>\n\nHello!"), USER],
    [USER, message("assistant", "<think>\nHm.\n</think>\n\nHello!")],
    [USER, message("assistant", "</think>\n\nHello!")],
    [USER, message("assistant", "a <think> b </think> c </think>\n\nd")],
    [USER, message("assistant", "Hello!", reasoning_content="\n\nI greet.\n")],
    [USER, message("assistant", "\nHello!", reasoning_content=None)],
    [USER, message("assistant", "Hello!", reasoning_content="Old."), USER, message("assistant", "\n\nAgain.")],
    [USER, SYSTEM, message("assistant", "Yes."), USER],
    [SYSTEM, SYSTEM, USER],
    [USER, message("assistant", "", tool_calls=[CALL]), message("tool", "sunny")],
    [USER, message("assistant", "", tool_calls=[CALL, FLAT_CALL]), message("tool", "1"), message("tool", "2")],
    [
        USER,
        message("assistant", "Let me see.", reasoning_content="Which tool?", tool_calls=[FLAT_CALL]),
        message("tool", "12:00"),
        message("assistant", "It is noon."),
    ],
    [
        USER,
        message("assistant", "", tool_calls=[CALL]),
        message("user", "<tool_response>\nsunny\n</tool_response>"),
        message("assistant", "", reasoning_content="More.", tool_calls=[CALL]),
        message("user", "<tool_response>\nrain\n</tool_response>"),
    ],
    [message("user", "<tool_response>x</tool_response>"), message("assistant", "ok", reasoning_content="r")],
    [message("assistant", "I speak first."), USER],
    [message("tool", "first"), USER],
    [message("user", "你好 <b>&'\" \\ 👍🏽"), message("assistant", "好", tool_calls=[])],
]

real_checkpoint = pytest.mark.skipif(
    not os.environ.get("QWEN3_MODEL"), reason="needs QWEN3_MODEL: a real Qwen3 folder or hub id"
)


@pytest.fixture(scope="module")
def qwen3() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["QWEN3_MODEL"])


@pytest.fixture(scope="module")
def ours() -> PreTrainedTokenizerFast:
    return load(DENSE)


def renderings(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    return [
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate, **thinking)
        for tools in (None, [], list(TOOL_BOX[:2]), [{"name": "é", "parameters": {"<": "'"}}])
        for generate in (True, False)
        for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    ]


@real_checkpoint
@pytest.mark.parametrize("chat", CHATS)
def test_template_renders_what_qwen3s_own_renders(
    qwen3: Any, ours: PreTrainedTokenizerFast, chat: list[dict[str, Any]]
) -> None:
    assert renderings(ours, chat) == renderings(qwen3, chat)


contents = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "x", "<tool_response>", "</tool_response>"])).map(
        "".join
    ),
)
calls = st.lists(st.sampled_from([CALL, FLAT_CALL]), max_size=2)
chats = st.lists(
    st.one_of(
        st.builds(message, st.sampled_from(["user", "system", "tool"]), contents),
        st.builds(lambda text, calls: message("assistant", text, tool_calls=calls), contents, calls),
        st.builds(lambda text, why: message("assistant", text, reasoning_content=why), contents, contents),
    ),
    min_size=1,
    max_size=6,
)


@real_checkpoint
@given(chats)
def test_template_renders_any_chat_as_qwen3s_own(
    qwen3: Any, ours: PreTrainedTokenizerFast, chat: list[dict[str, Any]]
) -> None:
    for tools in (None, list(TOOL_BOX[:1])):
        for generate in (True, False):
            options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": generate}
            assert ours.apply_chat_template(chat, **options) == qwen3.apply_chat_template(chat, **options)


def test_corpus_rendering_equals_the_tokenizers() -> None:
    tokenizer = load(DENSE)
    for chat in CHATS:
        for thinking in (True, False):
            expected = tokenizer.apply_chat_template(
                chat, tools=list(TOOL_BOX), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            assert render_chat(chat, tools=TOOL_BOX, enable_thinking=thinking) == expected


def test_tools_written_as_a_system_message_render_the_same() -> None:
    expected = render_chat([USER], tools=TOOL_BOX)
    assert render_chat([tools_as_system_message(TOOL_BOX), USER]) == expected
