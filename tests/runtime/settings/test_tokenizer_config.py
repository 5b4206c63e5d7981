"""tokenizer_config.json: what is said to count does, what is said not to count changes nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.runtime.settings.files import write_zeros
from tests.runtime.text.harness import split, write
from vibe_sgl_lite.runtime.errors import TokenizerError
from vibe_sgl_lite.runtime.launcher.spec import make_spec
from vibe_sgl_lite.runtime.settings.server_args import ServerArgs
from vibe_sgl_lite.runtime.settings.tokenizer_config import FILE, UNUSED, USED, end_token_id
from vibe_sgl_lite.runtime.text.chat_tokenizer import ChatTokenizer
from vibe_sgl_lite.runtime.transport.endpoints import Endpoints

TEMPLATE = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ messages[0].content }}"
LATE = {"content": "<|late|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False}
BASE: dict[str, Any] = {"chat_template": TEMPLATE, "bos_token": "<|end|>"}
# What each key that counts is changed to.
CHANGES: dict[str, Any] = {
    "added_tokens_decoder": {"401": LATE},
    "chat_template": "other",
    "bos_token": "<think>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "unk_token": {"__type": "AddedToken", "content": "<|unk|>"},
    "additional_special_tokens": ["<|extra|>"],
    "extra_special_tokens": ["<|extra|>"],
    "add_bos_token": True,
    "add_eos_token": True,
    "add_prefix_space": True,
    "split_special_tokens": True,
}
VALUES: dict[str, list[Any]] = {
    "padding_side": ["left", "right"],
    "truncation_side": ["left", "right"],
    "model_max_length": [2, 10**30],
    "max_length": [2],
    "model_input_names": [["input_ids"]],
}


def seen(folder: Path) -> tuple[Any, ...]:
    """All that the engine takes from a folder's tokenizer."""
    tokenizer = ChatTokenizer.from_folder(folder)
    text = "Hi <|end|>x <|late|>  y<think> <|pad|><|unk|><|extra|> it 's . me"
    ids = tokenizer.encode(text)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return (
        ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=False), tokenizer.special_ids,
        tokenizer.plain_text(chat), tokenizer.encode_chat(chat), end_token_id(folder),
    )  # fmt: skip


def test_every_key_that_counts_is_told_and_counts(tmp_path: Path) -> None:
    assert CHANGES.keys() == USED.keys()
    for key, value in CHANGES.items():
        for older in (False, True):
            base = BASE | ({"eos_token": "<|end|>"} if key == "add_eos_token" else {})
            folders = []
            for name, config in (("base", base), (key, base | {key: value})):
                folders.append(tmp_path / f"{name}-{key}-{older}")
                folders[-1].mkdir()
                write(folders[-1], config)
                if older:
                    split(folders[-1])
            counts = seen(folders[0]) != seen(folders[1])
            assert counts == (older or "no tokenizer.json" not in USED[key]), (key, older)


@pytest.mark.parametrize("older", [False, True])
def test_every_key_that_does_not_count_changes_nothing(tmp_path: Path, older: bool) -> None:
    base = tmp_path / "base"
    base.mkdir()
    write(base, BASE | {"eos_token": "<|end|>"})
    if older:
        split(base)
    expected = seen(base)
    config = json.loads((base / FILE).read_text())
    for key in sorted(UNUSED):
        for value in VALUES.get(key, [True, False, "replace"]):
            (base / FILE).write_text(json.dumps(config | {key: value}))
            assert seen(base) == expected, (key, value)


def test_other_keys_are_named_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = BASE | {"mood": "good", "image_token": "<|image|>"} | dict.fromkeys(UNUSED, 1)
    with caplog.at_level(logging.WARNING):
        end_token_id(write(tmp_path, config))
    assert [record.message for record in caplog.records] == [f"{tmp_path / FILE}: not known and not used: mood"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"eos_token": None}, None),
        ({"eos_token": "<|end|>"}, "<|end|>"),
        ({"eos_token": {"__type": "AddedToken", "content": "<think>"}}, "<think>"),
        ({"eos_token": "<|late|>", "added_tokens_decoder": {"401": LATE}}, 401),
        ({"eos_token": "<|end|>", "added_tokens_decoder": {"401": LATE}}, "<|end|>"),
        ({"eos_token": "<|nowhere|>"}, None),
        ({"eos_token": ["<|end|>"], "added_tokens_decoder": [1]}, None),
        ({"eos_token": "x", "added_tokens_decoder": {"١٢": "x", "-1": "x"}}, None),
    ],
)
def test_the_end_token(tmp_path: Path, config: dict[str, Any], expected: str | int | None) -> None:
    folder = write(tmp_path, config)
    if isinstance(expected, str):
        expected = ChatTokenizer.from_folder(folder).token_id(expected)
    assert end_token_id(folder) == expected


@pytest.mark.parametrize("text", ["", "[]", "{", '{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "null"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json") as error:
        end_token_id(tmp_path)
    assert "\n" not in str(error.value)


def test_the_engine_ends_outputs_there(model: Path, tmp_path: Path) -> None:
    (model / FILE).write_text(
        json.dumps({"eos_token": "<|stop|>", "added_tokens_decoder": {"9": {"content": "<|stop|>"}}})
    )
    args, endpoints = ServerArgs(model_path=str(model)), Endpoints(directory=str(tmp_path), api="ipc:///x")
    spec = make_spec(args, endpoints)
    assert spec.model.eos_token_ids == (1, 9)
    (model / FILE).write_text(json.dumps({"eos_token": "x", "added_tokens_decoder": {"99999": {"content": "x"}}}))
    assert make_spec(args, endpoints).model.eos_token_ids == (1,)
    other = tmp_path / "tokenizer"
    other.mkdir()
    (other / FILE).write_text(json.dumps({"eos_token": "x", "added_tokens_decoder": {"7": {"content": "x"}}}))
    args = msgspec.structs.replace(args, tokenizer_path=str(other))
    assert make_spec(args, endpoints).model.eos_token_ids == (1, 7)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8,
        "head_dim": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_zeros(folder)
    return folder
