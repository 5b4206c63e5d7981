"""Small tokenizers of the tests' own, and Qwen3's where a folder with it is given."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

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


def split(folder: Path) -> Path:
    """The older files in place of tokenizer.json."""
    file = folder / "tokenizer.json"
    model = json.loads(file.read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    file.unlink()
    return folder
